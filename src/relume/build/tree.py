"""A directory tree as content: its digest, and the times its files are given.

The digest covers what a process can see and rely on: names, types, modes, owners, sizes and bytes, link
targets, device numbers, hard links, and the extended attributes that change behaviour. It does not cover
times, inode numbers, directory sizes or the order on disk.

Times are made from content. An interpreter or JIT that caches by (path, mtime, size) then finds the same key
for the same bytes on every node and in every checkout, and another key as soon as the bytes differ, also
where the size does not. A constant time would let an edited file of equal length run from a stale cache.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

EPOCH = 315_532_800
"""1980-01-01, the earliest time a zip archive can hold. Content times lie in the 17 years after it."""

_SPAN = 1 << 29

_XATTRS = ("security.capability", "user.", "system.posix_acl_", "trusted.overlay.opaque")

_CHUNK = 1 << 20


def nothing() -> None:
    """The ``check`` of a caller that is never interrupted."""


def hash_file(path: Path, check: Callable[[], None] = nothing) -> bytes:
    """BLAKE3 of a regular file's bytes; ``check`` is called every MiB and may raise. Never follows a link."""
    hasher = blake3()
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb", buffering=0) as file:  # noqa: PTH123  (a descriptor, opened without following links)
        while block := file.read(_CHUNK):
            hasher.update(block)
            check()
    return hasher.digest()


def content_time(content: bytes) -> int:
    """The mtime, in seconds, of a file whose BLAKE3 is ``content``."""
    return EPOCH + int.from_bytes(content[:8], "big") % _SPAN


def walk(root: Path, check: Callable[[], None] = nothing) -> Iterator[tuple[str, os.stat_result]]:
    """(path below root, lstat) of everything under ``root``, parents first, siblings sorted by bytes."""
    pending = [""]
    while pending:
        relative = pending.pop()
        check()
        with os.scandir(root / relative if relative else root) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        directories = []
        for entry in ordered:
            below = f"{relative}/{entry.name}" if relative else entry.name
            status = entry.stat(follow_symlinks=False)
            yield below, status
            if stat.S_ISDIR(status.st_mode):
                directories.append(below)
        pending.extend(reversed(directories))


def digest(root: Path, check: Callable[[], None] = nothing) -> str:
    """The digest of a tree, 64 hex digits. Raises OSError where the tree cannot be read or changes."""
    hasher = blake3(b"relume layer 1\0")
    links: dict[tuple[int, int], str] = {}
    _feed(hasher, _describe(root, "", root.lstat(), links, check))
    for relative, status in walk(root, check):
        _feed(hasher, _describe(root / relative, relative, status, links, check))
    return hasher.hexdigest()


def _describe(
    path: Path,
    relative: str,
    status: os.stat_result,
    links: dict[tuple[int, int], str],
    check: Callable[[], None],
) -> list[bytes]:
    mode = status.st_mode
    head = [os.fsencode(relative), b"%o" % mode, b"%d:%d" % (status.st_uid, status.st_gid)]
    if stat.S_ISLNK(mode):
        return [*head, os.fsencode(path.readlink())]
    if stat.S_ISREG(mode):
        if status.st_nlink > 1:
            first = links.setdefault((status.st_dev, status.st_ino), relative)
            if first != relative:
                return [*head, b"link", os.fsencode(first)]
        head += [b"%d" % status.st_size, hash_file(path, check)]
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        head.append(b"%d" % status.st_rdev)
    for name in sorted(os.listxattr(path, follow_symlinks=False)):
        if name.startswith(_XATTRS):
            head += [os.fsencode(name), os.getxattr(path, name, follow_symlinks=False)]
    return head


def _feed(hasher: blake3, fields: list[bytes]) -> None:
    """Length-prefixed, so that no two descriptions run together to the same bytes."""
    hasher.update(b"%d\n" % len(fields))
    for field in fields:
        hasher.update(b"%d:" % len(field))
        hasher.update(field)
