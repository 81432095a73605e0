"""Where each page of a process's memory lies in ``pages-*.img``.

A pagemap lists runs of pages in address order; those that are present follow one another in the pages file
in that same order, whether lazy or not (criu/pagemap.c). Which of them CRIU leaves to a lazy-pages daemon
is written in the entry at dump time: private anonymous memory but for stacks, locked and huge pages.

Refuses, by name: pages in a parent image (incremental dumps), and entries with flags or fields that CRIU
4.2 does not know, such as the compressed pages of CRIU 4.3 (criu#2895).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relume.errors import ImageError
from relume.images.files import read_entries, read_image

PAGE_SIZE = 4096
"""Bytes. CRIU's image format counts in the pages of the machine; the machines relume knows have 4 KiB."""

_PARENT, _LAZY, _PRESENT = 1, 2, 4
"""PE_PARENT, PE_LAZY, PE_PRESENT of criu/include/pagemap.h."""

_MADV_WIPEONFORK = 18


@dataclass(frozen=True, slots=True)
class Extent:
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
    """The memory of one process (``pid`` as in the image): its extents in address order, all present."""

    pid: int
    pages: Path
    extents: tuple[Extent, ...]

    @property
    def lazy(self) -> Iterator[Extent]:
        return (extent for extent in self.extents if extent.lazy)

    @property
    def pages_bytes(self) -> int:
        """What the entries say is in the pages file, up to this process's last page."""
        return max((extent.offset + extent.length for extent in self.extents), default=0)


def read_pagemap(images: Path, pid: int) -> Pagemap:
    """The pagemap of process ``pid`` (as in the image) in the folder ``images``.

    Raises ImageError when a file is missing, damaged or of an unknown format, or the pages file is shorter
    than the entries say.
    """
    path = images / f"pagemap-{pid}.img"
    kind, entries = read_entries(path)
    if kind.name != "PAGEMAP" or not entries:
        raise ImageError(f"{path}: holds {kind.name}, not a pagemap", hint="take a new checkpoint")
    head = entries[0].message
    extents: list[Extent] = []
    offset = 0
    for entry in (each.message for each in entries[1:]):
        flags = entry.flags if entry.HasField("flags") else _PRESENT | (_PARENT if entry.in_parent else 0)
        if flags & ~(_PARENT | _LAZY | _PRESENT):
            raise _unknown(path, f"flags {flags:#x}")
        if flags & _PARENT:
            raise ImageError(
                f"{path}: pages in a parent image (an incremental dump)", hint="dump without a parent"
            )
        count = entry.nr_pages if entry.HasField("nr_pages") else entry.compat_nr_pages
        if not flags & _PRESENT:
            continue
        length = count * PAGE_SIZE
        extents.append(Extent(entry.vaddr, length, offset, bool(flags & _LAZY)))
        offset += length
    _refuse_new_fields(path, [entry.message for entry in entries])
    pagemap = Pagemap(pid, images / f"pages-{head.pages_id}.img", tuple(extents))
    _check_size(pagemap)
    return pagemap


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
        hint="dump with CRIU 4.1 to 4.2, or without compression",
    )
