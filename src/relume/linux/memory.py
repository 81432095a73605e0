"""How much memory the machine has, and how much of it can be had (proc_meminfo(5))."""

from __future__ import annotations

import dataclasses
from pathlib import Path


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
