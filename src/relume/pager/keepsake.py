"""Duplicates of the pager's userfaultfds in the keeper: so that none closes if pager and holder are killed at once.

A socket of whole messages (SOCK_SEQPACKET): ``+N`` with a descriptor, the pager's number N of it; ``-N`` when the
pager closes it. While a duplicate is open after that, faults wait; its closing lets them go on with the kernel's zeros.
"""

from __future__ import annotations

import os
import resource
import socket

_MESSAGE_BYTES = 32


class Keepsake:
    """The pager's end. Never waits for the keeper: what does not fit is told later, or not kept at all."""

    def __init__(self, end: socket.socket | None) -> None:
        """``end`` is the pager's; None where there is no keeper."""
        self._end = end
        self._given: set[int] = set()
        self._untold: list[int] = []
        if end is not None:
            end.setblocking(False)

    def give(self, descriptor: int) -> None:
        """Have a duplicate kept. The number may be one that was taken back: that must have been told before."""
        self.tell()
        if self._end is None or self._untold:
            return
        try:
            socket.send_fds(self._end, [b"+%d" % descriptor], [descriptor])
        except OSError:
            return  # no keeper, or one that is far behind
        self._given.add(descriptor)

    def take_back(self, descriptor: int) -> None:
        """The pager is about to close it: so shall the keeper."""
        if descriptor in self._given:
            self._given.discard(descriptor)
            self._untold.append(descriptor)
            self.tell()

    def tell(self) -> None:
        """Say what could not be said before. To be called now and then."""
        while self._end is not None and self._untold:
            try:
                self._end.send(b"-%d" % self._untold[0])
            except BlockingIOError:
                return
            except OSError:
                self._untold.clear()  # no keeper: its duplicates are gone with it
                return
            del self._untold[0]


class Kept:
    """The keeper's end, and the duplicates."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        end.setblocking(False)
        self._held: dict[int, int] = {}
        # The keeper needs descriptors for other things too.
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2

    def receive(self) -> bool:
        """Take in what was sent; False when the other end is closed."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self.socket, _MESSAGE_BYTES, 4, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not message:
                return False
            number = int(message[1:])
            if message.startswith(b"-") and number in self._held:
                os.close(self._held.pop(number))
            for descriptor in descriptors:
                if number in self._held or len(self._held) >= self._most:
                    os.close(descriptor)
                else:
                    self._held[number] = descriptor

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        """Let go of all. May be called twice."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
        self.socket.close()
