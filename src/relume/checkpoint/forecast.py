"""How large a checkpoint of an instance would be now, and how long its app would stand still for it.

Guesses, for ``checkpoints explain``: nothing is stopped for them. Memory is counted as in
:func:`relume.engine.preflight.estimate`, files as they lie on disk; the time goes by what this node's last
checkpoints took, or by what was measured elsewhere (docs/bench.md) as long as there are none.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from relume.checkpoint.shelf import Checkpoint, size_of
from relume.engine import held, preflight

_FIXED = 0.15
"""Seconds that even the smallest process stands still."""

_RATE = 0.7e9
"""Bytes a second that are written while all is frozen, on a machine of which nothing is known yet."""

_TELLING = 64 << 20
"""Bytes from which on a checkpoint says something of the rate."""

_RECENT = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Forecast:
    """Of one instance: processes, bytes of their memory and of the files that would come along, seconds."""

    processes: int
    memory_bytes: int
    held_bytes: int
    frozen_s: float


def forecast(
    pids: Sequence[int], *, rootfs: Path, upper: Path, everything: bool, past: Iterable[Checkpoint]
) -> Forecast:
    """``pids`` are the host pids of one container, ``past`` the node's checkpoints, the oldest first."""
    estimate = preflight.estimate(pids)
    files = file_bytes(pids, rootfs=rootfs, upper=upper, everything=everything)
    seconds = _FIXED + (estimate.total + files) / _rate(past)
    return Forecast(estimate.processes, estimate.total, files, round(seconds, 2))


def file_bytes(pids: Sequence[int], *, rootfs: Path, upper: Path, everything: bool) -> int:
    """Bytes on disk of the files that would come along."""
    return size_of(upper) if everything else held.expected_bytes(pids, rootfs=rootfs, upper=upper)


def _rate(past: Iterable[Checkpoint]) -> float:
    telling = [each for each in past if each.size_bytes >= _TELLING and each.frozen_s > _FIXED]
    rates = [each.size_bytes / (each.frozen_s - _FIXED) for each in telling[-_RECENT:]]
    return statistics.median(rates) if rates else _RATE
