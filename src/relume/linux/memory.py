"""How much memory the machine has, how much of it can be had (proc_meminfo(5)), and what is in it (mincore(2))."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from pathlib import Path

from relume.linux import syscall


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``available`` counts page cache that can be dropped."""

    total: int
    available: int


def machine() -> Memory:
    """As it is at this moment."""
    sizes = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) * 1024
    return Memory(sizes["MemTotal"], sizes["MemAvailable"])


def resident(address: int, length: int) -> bool:
    """Whether all of what is mapped there can be had without a disk. ``address`` is a page's; some 4 µs."""
    vector = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    if syscall.libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), vector) != 0:
        return False
    # Bit 0 is the page's; the others are reserved (mincore(2)) and read as 0.
    return vector.raw.count(0) == 0
