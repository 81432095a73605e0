"""Network namespaces: sockets made inside one, its loopback address, its interfaces.

A socket belongs for ever to the namespace of the thread that made it (socket(2), network_namespaces(7)).
So a thread that has entered the namespace makes the sockets, and anybody in the process may use them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from relume.linux import syscall

CLONE_NEWNET = 0x40000000

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_SIOCADDRT = 0x890B
_SIOCDELRT = 0x890C
_IFF_UP = 1
_RTF_UP = 1
_LAST_METRIC = 0x7FFF  # of struct rtentry, signed 16 bits

T = TypeVar("T")


class Inside:
    """A thread that lives in one network namespace and runs what it is given there, in order."""

    def __init__(self, namespace: int) -> None:
        """``namespace`` is a descriptor of /proc/PID/ns/net; it is not kept. Raises OSError."""
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        entered: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._live, args=(namespace, entered), daemon=True, name="inside"
        )
        self._thread.start()
        entered.result()

    def _live(self, namespace: int, entered: Future[None]) -> None:
        if syscall.libc().setns(namespace, CLONE_NEWNET) != 0:
            entered.set_exception(syscall.error("setns"))
            return
        entered.set_result(None)
        while (item := self._work.get()) is not None:
            work, done = item
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work`` inside and return what it returns. Raises OSError after :meth:`close`."""
        done: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the network namespace was left")
            self._work.put((work, done))
        return done.result()

    def close(self) -> None:
        """End the thread, which drops its hold on the namespace."""
        with self._lock:
            self._closed = True
            self._work.put(None)
        self._thread.join()


def loopback_up(addresses: Sequence[str]) -> None:
    """Bring ``lo`` up and give it ``addresses``, each a /32, beside 127.0.0.1 (as aliases ``lo:1``, ...).

    What goes out through ``lo`` is from the first of them. netdevice(7). To be run inside the namespace, e.g. by
    :meth:`Inside.run`.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _set_address(control, "lo", "127.0.0.1", "255.0.0.0")
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(control, _SIOCGIFFLAGS, request)[:18])[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))
        for number, address in enumerate(addresses, 1):
            _set_address(control, f"lo:{number}", address, "255.255.255.255")


def has_way_out() -> bool:
    """Whether the caller's namespace has an IPv4 default route that leaves it (proc_net(5): destination 00000000)."""
    with open("/proc/thread-self/net/route") as table:
        return any(
            fields[1] == "00000000" and fields[0] != "lo" for line in table if (fields := line.split("\t"))
        )


def hold_outgoing(hold: bool) -> None:
    """Let what is sent out before there is a way be lost, as on a slow line, and not be refused; or undo that.

    An IPv4 default route through ``lo``, the last that the kernel would take, has that effect: a packet keeps its
    route there, and the one of a unicast address that is not the namespace's own takes none in (ip_route_output,
    dst_discard). To be run inside the namespace.
    """
    nowhere = struct.pack("=HH12x", socket.AF_INET, 0)
    device = ctypes.create_string_buffer(b"lo")
    entry = struct.pack(
        "@L16s16s16sHhLPhPLLH",
        *(0, nowhere, nowhere, nowhere, _RTF_UP, 0, 0, 0),
        *(_LAST_METRIC, ctypes.addressof(device), 0, 0, 0),
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCADDRT if hold else _SIOCDELRT, entry)


def _set_address(control: socket.socket, name: str, address: str, mask: str) -> None:
    for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, mask)):
        body = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(value))
        fcntl.ioctl(control, request, body)


def listener(address: str, port: int, *, backlog: int) -> socket.socket:
    """A listening TCP socket, non-blocking. To be run inside the namespace."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    made.listen(backlog)
    return made


def stream_socket(family: int = socket.AF_INET) -> socket.socket:
    """An unconnected TCP socket, non-blocking. To be run inside the namespace."""
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)


def open_of(pid: int) -> int:
    """A descriptor of the network namespace of process ``pid``; the caller closes it."""
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
