"""What files need beyond `os`: opening them where a path comes from somebody else, writing them out early."""

from __future__ import annotations

import ctypes
import os
import struct

from relume.linux import syscall

_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_SYNC_FILE_RANGE_WRITE = 2


def open_below(root: int, path: str, flags: int) -> int:
    """openat2(2) with ``root``, a directory's descriptor, as ``/``: ``..`` and links cannot lead out of it.

    Raises OSError.
    """
    how = struct.pack("QQQ", flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return syscall.call(_OPENAT2, root, os.fsencode(path), how, len(how), what=path)


def start_writing(descriptor: int) -> None:
    """sync_file_range(2): begin to write what is dirty of the file to the disk, and return at once.

    Promises nothing, so it fails silently (on a tmpfs, say): fsync(2) has the last word.
    """
    whole = ctypes.c_int64(0)
    syscall.libc().sync_file_range(descriptor, whole, whole, _SYNC_FILE_RANGE_WRITE)
