"""How long an app would stand still: by what this node's last checkpoints took."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relume.checkpoint.forecast import forecast
from relume.checkpoint.shelf import Checkpoint, Intent

MIB = 1 << 20


def _past(checkpoint_of: Callable[..., Checkpoint], size: int, frozen_s: float) -> Checkpoint:
    return checkpoint_of(Intent("d", "i-1", "a", "b1", 1.0), size_bytes=size, frozen_s=frozen_s)


@pytest.mark.parametrize(
    ("past", "rate"),
    [
        ([], 0.7e9),
        ([(3, 0.2)], 0.7e9),  # too small to tell anything
        ([(100 * MIB, 1.15)], 100 * MIB),
        ([(100 * MIB, 99.0)] * 2 + [(100 * MIB, 1.15), (200 * MIB, 1.15), (300 * MIB, 1.15)] * 2, 200 * MIB),
    ],
    ids=["none yet", "a tiny one", "one", "only the last five count"],
)
def test_by_what_the_last_ones_took(
    past: list[tuple[int, float]], rate: float, checkpoint_of: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/file").write_bytes(bytes([1]) * 10 * MIB)
    os.sync()  # blocks are counted when they are written
    told = forecast(
        [os.getpid()],
        rootfs=Path("/"),
        upper=tmp_path / "layer",
        everything=True,
        past=[_past(checkpoint_of, *each) for each in past],
    )
    assert told.processes == 1
    assert told.held_bytes == 10 * MIB
    assert told.frozen_s == pytest.approx(0.15 + (told.memory_bytes + told.held_bytes) / rate, abs=0.01)
