"""CRIU's side of the story: the ``lazy-pages.socket`` in its work folder.

CRIU connects once. For each task it sends the pid (int32, as in the image; negative for a zombie, and then
nothing more) and after it the task's userfaultfd with one byte; when all is restored the number 0x52535446
(criu/uffd.c). The messages come from the tasks themselves, so the credentials that the kernel attaches tell
each one's pid on this host.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from relume.errors import PagerError

NAME = "lazy-pages.socket"

_FINISHED = 0x52535446
_NUMBER = struct.Struct("=i")
_CREDENTIALS = struct.Struct("=iII")
_PATIENCE_SECONDS = 10.0
"""How long the descriptor may take after the pid; CRIU sends them together."""


@dataclass(frozen=True, slots=True)
class Task:
    """A restored process: ``pid`` as in the image, ``host_pid`` here (None if the kernel did not say)."""

    pid: int
    host_pid: int | None
    descriptor: int


class Finished:
    """CRIU is done: everything is in place and registered, the tasks are about to run."""


class Closed:
    """CRIU closed the connection."""


def listen(work_dir: Path) -> socket.socket:
    """The listening socket, non-blocking, in place of one that may lie there. Raises PagerError."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        (work_dir / NAME).unlink(missing_ok=True)
        # Through the folder's descriptor: a socket's path is limited to 107 bytes (unix(7)).
        folder = os.open(work_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            server.bind(f"/proc/self/fd/{folder}/{NAME}")
        finally:
            os.close(folder)
        server.listen(1)
    except OSError as error:
        server.close()
        raise PagerError(
            f"{work_dir}/{NAME}: cannot listen ({error.strerror})", hint="is the folder there?"
        ) from error
    server.setblocking(False)
    return server


class Connection:
    """CRIU, connected."""

    def __init__(self, server: socket.socket) -> None:
        """Accepts. Raises OSError."""
        self.socket, _ = server.accept()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.settimeout(_PATIENCE_SECONDS)

    def receive(self) -> Task | Finished | Closed | None:
        """The next message, to be called when the socket is readable; None for a zombie. Raises PagerError."""
        try:
            number, _, host_pid = self._message(_NUMBER.size)
            if not number:
                return Closed()
            (pid,) = _NUMBER.unpack(number)
            if pid == _FINISHED:
                return Finished()
            if pid < 0:
                return None
            _, descriptor, host_pid = self._message(1)
        except (OSError, struct.error) as error:
            raise PagerError(
                f"CRIU spoke out of turn on {NAME}: {error}", hint="which CRIU is it?"
            ) from error
        if descriptor is None:
            raise PagerError(f"CRIU sent no userfaultfd for process {pid}", hint="which CRIU is it?")
        return Task(pid, host_pid, descriptor)

    def _message(self, size: int) -> tuple[bytes, int | None, int | None]:
        room = socket.CMSG_SPACE(4) + socket.CMSG_SPACE(_CREDENTIALS.size)
        data, ancillary, _, _ = self.socket.recvmsg(size, room, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC)
        descriptor: int | None = None
        host_pid: int | None = None
        for level, kind, content in ancillary:
            if level != socket.SOL_SOCKET:
                continue
            if kind == socket.SCM_RIGHTS:
                descriptor = array.array("i", content)[0]
            elif kind == socket.SCM_CREDENTIALS:
                host_pid = _CREDENTIALS.unpack(content)[0] or None
        return data, descriptor, host_pid
