"""What the saved memory of each process was mapped as: heap, stack, anonymous, or a file.

From ``mm-PID.img`` (the mappings) and the pagemap (which of their pages are in the images). Pages of a file that
were never written are not in the images, and do not count.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relume.images.files import read_image
from relume.images.pagemap import read_pagemap

_STACK, _HEAP, _FILE_PRIVATE, _FILE_SHARED, _ANON_SHARED, _MEMFD = (
    1 << 1,
    1 << 5,
    1 << 6,
    1 << 7,
    1 << 8,
    1 << 14,
)
"""VMA_* of criu/include/image.h."""

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Mapped:
    """``saved_bytes`` of process ``pid`` (as inside) are of mappings of ``what``: a path, or a word in brackets."""

    pid: int
    what: str
    saved_bytes: int


def saved_by_mapping(images: Path) -> list[Mapped]:
    """The largest first, for each process the twelve largest and the rest together. Raises ImageError."""
    files = _files(images)
    found = []
    for task in read_image(images / "pstree.img"):
        if not (images / f"pagemap-{task.pid}.img").exists():
            continue
        (mm,) = read_image(images / f"mm-{task.pid}.img")
        starts = [vma.start for vma in mm.vmas]
        counts: Counter[str] = Counter()
        for extent in read_pagemap(images, task.pid).extents:
            address = extent.address
            while address < extent.end:
                at = bisect_right(starts, address) - 1
                inside = at >= 0 and address < mm.vmas[at].end
                following = starts[at + 1] if at + 1 < len(starts) else extent.end
                end = min(extent.end, mm.vmas[at].end if inside else following)
                counts[_what(mm.vmas[at], mm, files) if inside else "[unknown]"] += end - address
                address = end
        largest = counts.most_common(_SHOWN)
        rest = counts.total() - sum(size for _, size in largest)
        found += [Mapped(task.pid, what, size) for what, size in largest]
        found += [Mapped(task.pid, "[others]", rest)] if rest else []
    return sorted(found, key=lambda mapped: mapped.saved_bytes, reverse=True)


def _what(vma: Any, mm: Any, files: dict[int, str]) -> str:
    if vma.status & _MEMFD:
        return "[memfd]"
    if vma.status & (_FILE_PRIVATE | _FILE_SHARED):
        return files.get(vma.shmid, "[file]")
    if vma.status & _ANON_SHARED:
        return "[shared]"
    if vma.status & _HEAP or mm.mm_start_brk <= vma.start < mm.mm_brk:
        return "[heap]"
    if vma.status & _STACK or vma.start <= mm.mm_start_stack < vma.end:
        return "[stack]"
    return "[anonymous]"


def _files(images: Path) -> dict[int, str]:
    """Paths by the id that mappings have in ``shmid``."""
    path = images / "files.img"
    entries = read_image(path) if path.exists() else []
    # A name that is no UTF-8 is read as bytes.
    return {entry.id: os.fsdecode(entry.reg.name) for entry in entries if entry.HasField("reg")}
