"""How much memory may still be filled without anybody being killed for it.

The kernel charges a page that is copied in to the app's cgroup, and its OOM killer looks there when the limit
is reached. So the fill asks first. Page cache that can be dropped counts as free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from relume.linux import cgroup, memory

MARGIN_BYTES = 64 << 20
"""What is always left to the app, besides 5 % of its limit."""

_FILES = (
    ("memory.current", "memory.max", "inactive_file"),
    ("memory.current", "memory.high", "inactive_file"),  # kills nobody, but slows down everybody
    ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
)


def available(group: str | None) -> int:
    """Bytes that may be filled now: the least of what the group, those above it and the machine have to spare.

    Negative when there is less than the margin.
    """
    room = memory.machine().available - MARGIN_BYTES
    if group is not None:
        # The roots too: where the node runs in a container, they are the container's, and so is their limit.
        directories = [each for name in _upwards(group) for each in cgroup.directories(name)]
        for directory in (*directories, *cgroup.hierarchies()):
            for used, limit in _used_and_limit(directory):
                room = min(room, limit - used - max(MARGIN_BYTES, limit // 20))
    return room


def _upwards(group: str) -> Iterator[str]:
    parts = [part for part in group.split("/") if part]
    for count in range(len(parts), 0, -1):
        yield "/" + "/".join(parts[:count])


def _used_and_limit(directory: Path) -> Iterator[tuple[int, int]]:
    for used, limit, reclaimable in _FILES:
        try:
            bound = (directory / limit).read_text().strip()
            if bound == "max" or int(bound) >= 1 << 60:
                continue
            droppable = _field(directory / "memory.stat", reclaimable + " ")
            yield int((directory / used).read_text()) - droppable, int(bound)
        except OSError:
            continue  # not a memory hierarchy, or the group has just been removed


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0
