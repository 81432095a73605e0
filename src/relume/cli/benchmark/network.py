"""A network for a node of its own: nodes on one machine then share no port, and reach each other no more than nodes
on two machines that have nothing but a store in common.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from relume.linux import netns, syscall

T = TypeVar("T")


class Network:
    """A network namespace with nothing but loopback. It lives as long as this, or a process in it."""

    def __init__(self, descriptor: int) -> None:
        """``descriptor`` is the namespace's; it is the caller's to close. Raises OSError."""
        self.descriptor = descriptor
        self._inside = netns.Inside(descriptor)
        self._inside.run(lambda: netns.loopback_up(()))

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread that lives there."""
        return self._inside.run(work)

    def listener(self, port: int) -> socket.socket:
        """A listening socket on its 127.0.0.1, for whoever in the process serves it."""
        made = self.run(lambda: netns.listener("127.0.0.1", port, backlog=256))
        made.setblocking(True)
        return made

    def command(self) -> list[str]:
        """What begins the command line of a process that is to live there; it must inherit ``descriptor``."""
        return ["nsenter", f"--net=/proc/self/fd/{self.descriptor}"]

    def close(self) -> None:
        self._inside.close()


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A new one while the block runs. Raises OSError."""
    descriptor = _new_namespace()
    try:
        made = Network(descriptor)
        try:
            yield made
        finally:
            made.close()
    finally:
        os.close(descriptor)


def _new_namespace() -> int:
    """A descriptor of a new network namespace: a thread leaves ours, opens its own, and ends."""
    made: Future[int] = Future()

    def leave() -> None:
        if syscall.libc().unshare(netns.CLONE_NEWNET) != 0:
            made.set_exception(syscall.error("unshare"))
        else:
            made.set_result(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=leave, name="new-network")
    thread.start()
    thread.join()
    return made.result()
