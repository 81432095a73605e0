"""userfaultfd(2): reading its messages, and the calls that put pages into another process's memory.

Sources: userfaultfd(2), ioctl_userfaultfd(2), include/uapi/linux/userfaultfd.h, Documentation/admin-guide/mm/
userfaultfd.rst. The calls leave the GIL: fcntl.ioctl copies the small argument and releases it.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import mmap
import os
import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple

from relume.linux import syscall

UFFD_USER_MODE_ONLY = 1
FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_EVENT_UNMAP = 1 << 6

_PROT_NONE = 0
_MAP_FAILED = (1 << 64) - 1

_API = 0xAA
_NR_USERFAULTFD = {"x86_64": 323, "aarch64": 282}

_RANGE = struct.Struct("=QQ")
_REGISTER = struct.Struct("=QQQQ")
_API_ARGUMENT = struct.Struct("=QQQ")
_COPY = struct.Struct("=QQQQq")
_ZERO = struct.Struct("=QQQq")
_MESSAGE = struct.Struct("=BxHxxxxQQQ")
"""event, 7 reserved bytes, three words whose meaning depends on the event: 32 bytes."""

_READ, _WRITE = 2, 1


def _request(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAA << 8 | number


_UFFDIO_API = _request(_READ | _WRITE, 0x3F, _API_ARGUMENT.size)
_UFFDIO_REGISTER = _request(_READ | _WRITE, 0x00, _REGISTER.size)
_UFFDIO_WAKE = _request(_READ, 0x02, _RANGE.size)
_UFFDIO_COPY = _request(_READ | _WRITE, 0x03, _COPY.size)
_UFFDIO_ZEROPAGE = _request(_READ | _WRITE, 0x04, _ZERO.size)


class Fault(NamedTuple):
    """A thread waits for the page at ``address`` (page-aligned by the kernel unless asked otherwise)."""

    address: int


class Fork(NamedTuple):
    """The process forked; ``descriptor`` is the child's userfaultfd, already open here."""

    descriptor: int


class Remap(NamedTuple):
    """mremap(2) moved ``length`` bytes from ``source`` to ``destination``."""

    source: int
    destination: int
    length: int


class Remove(NamedTuple):
    """madvise(2) gave up the contents of [start, end): MADV_DONTNEED, MADV_FREE, MADV_REMOVE. Still mapped."""

    start: int
    end: int


class Unmap(NamedTuple):
    """[start, end) is no longer mapped: munmap(2), or something else was mapped over it."""

    start: int
    end: int


Message = Fault | Fork | Remap | Remove | Unmap


def open_userfaultfd(features: int, *, user_mode_only: bool = False) -> int:
    """A new userfaultfd for the calling process, non-blocking, close-on-exec, with ``features`` agreed.

    Raises OSError: EPERM without privilege and vm.unprivileged_userfaultfd=0, unless ``user_mode_only``
    (which then answers faults of user code only); EINVAL for a feature the kernel lacks.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (UFFD_USER_MODE_ONLY if user_mode_only else 0)
    descriptor = syscall.call(_NR_USERFAULTFD[os.uname().machine], flags, what="userfaultfd")
    try:
        fcntl.ioctl(descriptor, _UFFDIO_API, bytearray(_API_ARGUMENT.pack(_API, features, 0)), True)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def register(descriptor: int, start: int, length: int) -> None:
    """Faults on missing pages of the range come to ``descriptor`` from now on. Raises OSError."""
    fcntl.ioctl(descriptor, _UFFDIO_REGISTER, bytearray(_REGISTER.pack(start, length, 1, 0)), True)


def read(descriptor: int, limit: int = 64) -> list[Message]:
    """What is queued, at most ``limit`` messages, without waiting; empty when there is nothing.

    The kernel hands out faults before all else, then the other events in order. The thread that caused an
    event other than a fault goes on once its message was read. Raises OSError.
    """
    try:
        data = os.read(descriptor, limit * _MESSAGE.size)
    except BlockingIOError:
        return []
    return [_message(*fields) for fields in _MESSAGE.iter_unpack(data)]


def copy(descriptor: int, destination: int, source: int, length: int) -> tuple[int, int]:
    """Puts a copy of ``length`` bytes at our address ``source`` there at ``destination``, and wakes who waits.

    Returns (bytes copied, errno). A partial copy counts as copied with errno 0: to learn why it stopped,
    ask for the rest. errno, when nothing was copied: EEXIST (a page is there), ENOENT (no mapping
    registered there, or the range spans two), EAGAIN (the layout is changing: an event is or will be
    queued), ESRCH (the process is gone), ENOMEM, EFAULT (the source cannot be read), ENOSPC.
    """
    return _give(descriptor, _UFFDIO_COPY, _COPY, length, destination, source)


def zero(descriptor: int, start: int, length: int) -> tuple[int, int]:
    """Puts pages that read as zeros there. Result and errors as of :func:`copy`."""
    return _give(descriptor, _UFFDIO_ZEROPAGE, _ZERO, length, start)


def _give(descriptor: int, request: int, form: struct.Struct, length: int, *where: int) -> tuple[int, int]:
    argument = bytearray(form.pack(*where, length, 0, 0))
    try:
        fcntl.ioctl(descriptor, request, argument, True)
    except OSError as error:
        done = form.unpack(argument)[-1]
        # EAGAIN with a count is a copy that stopped midway. The count stays 0 or negative otherwise.
        return (done, 0) if error.errno == errno.EAGAIN and done > 0 else (0, error.errno or errno.EIO)
    return length, 0


def ask(descriptor: int, start: int, length: int) -> int:
    """What a copy to [start, start + length) would fail with, or 0; gives nothing and reads no contents.

    By a copy that cannot be made: its source is memory of ours that nobody may read. The kernel looks whether
    anything is changing (EAGAIN), then whether the memory exists (ESRCH), then whether one registered mapping holds
    the range (ENOENT), and only then at the source. ENOMEM tells nothing: it takes a page before it looks.
    """
    error = copy(descriptor, start, _unreadable_page(), length)[1]
    return 0 if error in (errno.EFAULT, errno.EEXIST) else error


def wake(descriptor: int, start: int, length: int) -> None:
    """Lets threads that wait for a page of the range look again. Raises OSError."""
    fcntl.ioctl(descriptor, _UFFDIO_WAKE, bytearray(_RANGE.pack(start, length)), True)


class Condition(enum.Enum):
    """What becomes of the memory that a userfaultfd stands for."""

    QUIET = enum.auto()
    """It exists, and no event of it is queued or under way."""
    CHANGING = enum.auto()
    """An event is queued, or its cause has not gone on yet."""
    GONE = enum.auto()
    """The process ended or exec'd."""


def condition(descriptor: int) -> Condition:
    """Asks the kernel, and changes nothing.

    The address asked about (:func:`ask`) must not be below vm.mmap_min_addr: before Linux 6.18 that is EINVAL, whether
    alive or not.
    """
    match ask(descriptor, _lowest_address(), mmap.PAGESIZE):
        case errno.ESRCH:
            return Condition.GONE
        case errno.EAGAIN:
            return Condition.CHANGING
    return Condition.QUIET


def alive(descriptor: int) -> bool:
    """Whether the memory that ``descriptor`` stands for still exists (the process neither ended nor exec'd)."""
    return condition(descriptor) is not Condition.GONE


@cache
def _lowest_address() -> int:
    try:
        lowest = int(Path("/proc/sys/vm/mmap_min_addr").read_text())
    except OSError:
        lowest = 0
    return max(lowest, 1 << 16) + mmap.PAGESIZE - 1 & -mmap.PAGESIZE


@cache
def _unreadable_page() -> int:
    """The address of a page without any permission."""
    libc = syscall.libc()
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    page = libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE, flags, -1, ctypes.c_long(0))
    if page in (None, _MAP_FAILED):
        raise syscall.error("mmap")
    return int(page)


def _message(event: int, _reserved: int, first: int, second: int, third: int) -> Message:
    match event:
        case 0x12:  # arg.pagefault: flags, address
            return Fault(second)
        case 0x13:  # arg.fork.ufd, 32 bits
            return Fork(first & 0xFFFFFFFF)
        case 0x14:  # arg.remap: from, to, len
            return Remap(first, second, third)
        case 0x15:  # arg.remove: start, end
            return Remove(first, second)
        case 0x16:
            return Unmap(first, second)
    raise OSError(errno.EPROTO, f"userfaultfd event {event:#x} was not asked for")
