"""Where a dump is written while the app stands still: the disk's page cache, or memory and the disk afterwards.

A write to a file is a copy into the page cache, as fast as into memory by any other name, until too much of the cache
waits for the disk: then the kernel makes the writer wait for it (balance_dirty_pages, mm/page-writeback.c), and the
app stands still at the disk's speed. Half way between vm.dirty_background_ratio and vm.dirty_ratio that begins; a few
GB, less what waits already. So a dump that fits below goes to the disk at once; a larger one goes to a tmpfs where the
machine has the memory to spare for it, and is moved to the disk when the app runs again.

Guarantees: what :func:`land` has moved lies in the same place, on the disk; it may be cut short anywhere and done
again, by another run of the node too, since the tmpfs is the kernel's. The memory is the machine's, never taken out of
the app's own limit.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Literal

from relume.linux import memory, mounts

Policy = Literal["auto", "always", "never"]

_SLACK = 1.25
"""The expected size is an estimate; a tmpfs that is too small would fail the dump, and an empty one costs nothing."""

_SPARE = 0.1
"""Of the machine's memory, to be left for everybody else."""

_SMALL = 64 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """Bytes: ``unwritten`` can be written now without waiting for the disk; memory as in /proc/meminfo."""

    unwritten: int
    available: int
    total: int


def measure() -> Room:
    """The machine's room at this moment (/proc/vmstat, /proc/meminfo)."""
    vmstat = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    pages = {name: int(count) for name, count in vmstat}
    there = memory.machine()
    begins = (pages["nr_dirty_threshold"] + pages["nr_dirty_background_threshold"]) // 2
    waiting = pages["nr_dirty"] + pages["nr_writeback"]
    return Room((begins - waiting) * _PAGE, there.available, there.total)


def wanted(expected: int, room: Room, policy: Policy = "auto") -> bool:
    """Whether a dump of about ``expected`` bytes should go to memory first."""
    if policy != "auto":
        return policy == "always"
    size = _size(expected)
    return size > room.unwritten and size + _SPARE * room.total < room.available


def stage(directory: Path, expected: int) -> None:
    """Make ``directory``, which is there and empty, memory-backed. Raises OSError."""
    data = f"mode=700,size={_size(expected)}"
    try:
        # Few large pages are filled faster than many small ones.
        mounts.mount("relume-dump", directory, "tmpfs", data=f"{data},huge=always")
    except OSError:
        mounts.mount("relume-dump", directory, "tmpfs", data=data)  # a kernel without


def land(directory: Path) -> bool:
    """Move what was staged in ``directory`` to the disk below it; False if nothing was. Raises OSError."""
    copying, whole = (directory.with_name(f"{directory.name}.{word}") for word in ("copying", "whole"))
    staged = bool(mounts.under(directory.resolve()))
    if staged and not whole.exists():
        shutil.rmtree(copying, ignore_errors=True)
        copying.mkdir(mode=0o700)
        for path in directory.iterdir():
            shutil.copy2(path, copying / path.name, follow_symlinks=False)
        copying.rename(whole)
    if staged:
        mounts.unmount(directory)
    if whole.exists():
        directory.rmdir()
        whole.rename(directory)
    return staged


def drop(directory: Path) -> None:
    """Give back the memory of whatever is staged below ``directory``."""
    mounts.unmount_all(directory.resolve())


def _size(expected: int) -> int:
    return round(expected * _SLACK) + _SMALL
