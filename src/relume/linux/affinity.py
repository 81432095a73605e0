"""Which processors the threads of a container may run on (sched_setaffinity(2)): CRIU saves policy and nice, not this.

Threads are named by the pid that they have in their container. Standard library only: the keeper runs this.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from relume.linux import process
from relume.linux.proc import GONE

Affinity = list[dict[str, Any]]
"""Threads that may not run everywhere: ``{"thread": its pid inside, "processors": [the numbers it may run on]}``."""


def read(pids: Iterable[int]) -> Affinity:
    """Of the threads of these processes (host pids), those that are kept from processors which are open to us."""
    everywhere = os.sched_getaffinity(0)
    found = []
    for thread in _threads(pids):
        try:
            allowed = os.sched_getaffinity(thread)
        except ProcessLookupError:
            continue
        if allowed != everywhere and (inner := process.inner_pid(thread)) is not None:
            found.append({"thread": inner, "processors": sorted(allowed)})
    return found


def apply(pids: Iterable[int], wanted: Affinity) -> None:
    """Give the threads of these processes (host pids) what ``wanted`` says.

    A thread whose processors this machine has none of runs everywhere.
    """
    by_thread = {each["thread"]: each["processors"] for each in wanted}
    for thread in _threads(pids):
        allowed = by_thread.get(process.inner_pid(thread) or 0)
        if allowed is not None:
            try:
                os.sched_setaffinity(thread, allowed)
            except (ProcessLookupError, OSError):  # EINVAL: none of them is here
                continue


def _threads(pids: Iterable[int]) -> Iterable[int]:
    for pid in pids:
        try:
            yield from map(int, os.listdir(f"/proc/{pid}/task"))
        except GONE:
            continue
