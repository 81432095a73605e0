"""What files need beyond `os`: opening and removing what somebody else has made, writing it out early."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import struct
from pathlib import Path

from relume.linux import syscall

_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_SYNC_FILE_RANGE_WRITE = 2
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_below(root: int, path: str, flags: int) -> int:
    """openat2(2) with ``root``, a directory's descriptor, as ``/``: ``..`` and links cannot lead out of it.

    Raises OSError.
    """
    how = struct.pack("QQQ", flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return syscall.call(_OPENAT2, root, os.fsencode(path), how, len(how), what=path)


def remove_tree(root: Path) -> None:
    """Remove a tree that an app has made, as far as that can be done, however deep it is.

    shutil.rmtree recurses, and gives up after a thousand levels with a RecursionError. Here what is below a directory
    is moved up to the top before its turn comes, so one directory is open at a time.
    """
    try:
        top = os.open(root, _DIRECTORY)
    except OSError:
        return
    try:
        moved = secrets.token_hex(8)
        pending = _empty(top, top, moved)
        while pending:
            name = pending.pop()
            with contextlib.suppress(OSError):
                descriptor = os.open(name, _DIRECTORY, dir_fd=top)
                try:
                    pending += _empty(descriptor, top, f"{moved}.{len(pending)}.{secrets.token_hex(4)}")
                finally:
                    os.close(descriptor)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        root.rmdir()


def _empty(directory: int, top: int, moved: str) -> list[str]:
    """Remove what is in ``directory``; its directories are moved to ``top``, where their names are those returned."""
    found = []
    for number, name in enumerate(os.listdir(directory)):
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=directory)
            except IsADirectoryError:
                place = name if directory == top else f"{moved}.{number}"
                if directory != top:
                    os.rename(name, place, src_dir_fd=directory, dst_dir_fd=top)
                found.append(place)
    return found


def start_writing(descriptor: int) -> None:
    """sync_file_range(2): begin to write what is dirty of the file to the disk, and return at once.

    Promises nothing, so it fails silently (on a tmpfs, say): fsync(2) has the last word.
    """
    whole = ctypes.c_int64(0)
    syscall.libc().sync_file_range(descriptor, whole, whole, _SYNC_FILE_RANGE_WRITE)
