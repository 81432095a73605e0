"""Where each page of a process's memory lies in ``pages-*.img``.

A pagemap lists runs of pages in address order; those that are present follow one another in the pages file
in that same order, whether lazy or not (criu/pagemap.c). Which of them CRIU leaves to a lazy-pages daemon
is written in the entry at dump time: private anonymous memory but for stacks, locked and huge pages.

Refuses, by name: pages in a parent image (incremental dumps), and entries with flags or fields that CRIU
4.2 does not know, such as the compressed pages of CRIU 4.3 (criu#2895).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from relume.errors import ImageError
from relume.images.files import read_image, read_magic
from relume.images.proto import pagemap_pb2, relume_pb2

PAGE_SIZE = 4096
"""Bytes. CRIU's image format counts in the pages of the machine; the machines relume knows have 4 KiB."""

_PARENT, _LAZY, _PRESENT = 1, 2, 4
"""PE_PARENT, PE_LAZY, PE_PRESENT of criu/include/pagemap.h."""

_MADV_WIPEONFORK = 18
_LENGTH = struct.Struct("<I")


class Extent(NamedTuple):
    """``length`` bytes of memory at ``address``, to be found at ``offset`` in the pages file."""

    address: int
    length: int
    offset: int
    lazy: bool

    @property
    def end(self) -> int:
        return self.address + self.length


@dataclass(frozen=True, slots=True)
class Pagemap:
    """The memory of one process (``pid`` as in the image): its extents in address order, all present.

    ``pages_bytes`` is what its pages file must hold at least.
    """

    pid: int
    pages: Path
    extents: tuple[Extent, ...]
    pages_bytes: int

    @property
    def pages_id(self) -> int:
        """The number in the pages file's name."""
        return int(self.pages.stem.rpartition("-")[2])

    @property
    def lazy(self) -> Iterator[Extent]:
        return (extent for extent in self.extents if extent.lazy)


def read_pagemap(images: Path, pid: int) -> Pagemap:
    """The pagemap of process ``pid`` (as in the image) in the folder ``images``.

    Raises ImageError when a file is missing, damaged or of an unknown format, or the pages file is shorter
    than the entries say.
    """
    path = images / f"pagemap-{pid}.img"
    head, entries = _entries(path)
    extents: list[Extent] = []
    offset = 0
    for entry in entries:
        flags = entry.flags
        if not flags and not entry.HasField("flags"):
            flags = _PRESENT | (_PARENT if entry.in_parent else 0)
        if flags & ~(_PARENT | _LAZY | _PRESENT):
            raise _unknown(path, f"flags {flags:#x}")
        if flags & _PARENT:
            raise ImageError(
                f"{path}: pages in a parent image (an incremental dump)", hint="dump without a parent"
            )
        if not flags & _PRESENT:
            continue
        length = (entry.nr_pages or entry.compat_nr_pages) * PAGE_SIZE
        extents.append(Extent(entry.vaddr, length, offset, flags & _LAZY != 0))
        offset += length
    pagemap = Pagemap(pid, images / f"pages-{head.pages_id}.img", tuple(extents), offset)
    _check_size(pagemap)
    return pagemap


def _entries(path: Path) -> tuple[Any, Sequence[Any]]:
    """The head, and the entries as one repeated field: there may be ten thousands, and a restore waits for them.

    Each entry in the file has its length before it in 4 bytes; as a field of one message it has a tag and the
    length as a varint instead, and protobuf parses all in one call.
    """
    data = read_magic(path, "PAGEMAP")
    parts: list[bytes] = []
    position = 0
    while position < len(data):
        (size,) = _LENGTH.unpack_from(data, position) if position + 4 <= len(data) else (len(data),)
        payload = data[position + 4 : position + 4 + size]
        if (
            len(payload) < size or size >= 1 << 14
        ):  # as long as two bytes of a varint can say; entries have 30
            raise ImageError(
                f"{path}: ends early, after {len(data)} bytes of entries", hint="take a new checkpoint"
            )
        if position:
            parts.append(
                b"\x0a" + (bytes((size,)) if size < 0x80 else bytes((size & 0x7F | 0x80, size >> 7)))
            )
        parts.append(payload)
        position += 4 + size
    if not parts:
        raise ImageError(f"{path}: is empty", hint="take a new checkpoint")
    head, all_entries = pagemap_pb2.pagemap_head(), relume_pb2.relume_pagemap()
    try:
        head.ParseFromString(parts[0])
        all_entries.ParseFromString(b"".join(parts[1:]))
    except DecodeError as error:
        raise ImageError(f"{path}: is damaged ({error})", hint="take a new checkpoint") from error
    _refuse_new_fields(path, [head, all_entries])
    return head, all_entries.entries


def pages_sizes(images: Path) -> dict[int, int]:
    """Bytes of each pages file, by its number. Raises ImageError."""
    pids = [task.pid for task in read_image(images / "pstree.img")]
    found = [read_pagemap(images, pid) for pid in pids if (images / f"pagemap-{pid}.img").exists()]
    return {pagemap.pages_id: pagemap.pages_bytes for pagemap in found}


def lazy_bytes(images: Path) -> dict[int, int]:
    """Bytes of lazy memory of each process (pid as in the image) in ``images``. Raises ImageError.

    This is what all of them together hold once filled: what forked processes shared at the dump is private
    to each after a lazy restore (criu/mem.c skips its comparing for lazy pages), so their sum, not the
    size that the cgroup had, is to be compared with the room there is.
    """
    found = {}
    for path in sorted(images.glob("pagemap-[0-9]*.img")):
        pid = int(path.stem.partition("-")[2])
        found[pid] = sum(extent.length for extent in read_pagemap(images, pid).lazy)
    return found


def read_wiped_on_fork(images: Path, pid: int) -> list[tuple[int, int]]:
    """[start, end) of the mappings of ``pid`` that a child of it gets empty (madvise(2), MADV_WIPEONFORK).

    From the bit map of advice in ``mm-PID.img``. Raises ImageError.
    """
    (mm,) = read_image(images / f"mm-{pid}.img")
    return [(vma.start, vma.end) for vma in mm.vmas if vma.madv >> _MADV_WIPEONFORK & 1]


def _check_size(pagemap: Pagemap) -> None:
    try:
        size = pagemap.pages.stat().st_size
    except OSError as error:
        if not pagemap.extents:
            return  # CRIU writes no pages file for a process without pages of its own
        raise ImageError(f"{pagemap.pages}: {error.strerror}", hint="take a new checkpoint") from error
    if size < pagemap.pages_bytes:
        raise ImageError(
            f"{pagemap.pages}: is short, {size} bytes of {pagemap.pages_bytes}", hint="take a new checkpoint"
        )


def _refuse_new_fields(path: Path, messages: Iterable[Any]) -> None:
    """Fields of a newer format survive parsing as unknown ones: their bytes are missing without them."""
    for message in messages:
        size = message.ByteSize()
        message.DiscardUnknownFields()
        if message.ByteSize() != size:
            raise _unknown(path, "fields that CRIU 4.2 does not have")


def _unknown(path: Path, what: str) -> ImageError:
    return ImageError(
        f"{path}: {what}: a newer page format, such as the compressed pages of CRIU 4.3",
        hint="dump with CRIU 4.2, or without compression",
    )
