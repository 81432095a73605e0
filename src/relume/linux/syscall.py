"""Raw system calls through libc, for those that neither ``os`` nor an old glibc wraps.

The numbers from 424 on are the same on every architecture (Linux unified them in 5.1).
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

OPEN_TREE = 428
MOVE_MOUNT = 429
MOUNT_SETATTR = 442


def call(number: int, *args: int | bytes | None, what: str = "") -> int:
    """``syscall(number, ...)``; raises OSError with ``what`` as the file name when it returns -1."""
    converted = [ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise error(what)
    return result


def error(what: str = "") -> OSError:
    """The OSError for the current ``errno``."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what or None)


def libc() -> ctypes.CDLL:
    """The process's C library, with errno kept per thread."""
    return _libc
