"""Restores under memory pressure, with pager or holder killed at random: no wrong byte, nobody left hanging.

``script/test`` makes 20 of them; ``script/test --all`` makes 500, or as many as RELUME_SOAK says:

    .venv/bin/python -m pytest tests/e2e/test_pager_soak.py -m slow -s
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pager.soak import Soak, say


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(20, marks=pytest.mark.timeout(600)),
        pytest.param(
            int(os.environ.get("RELUME_SOAK", "500")), marks=[pytest.mark.slow, pytest.mark.timeout(7200)]
        ),
    ],
    ids=["short", "long"],
)
def test_no_wrong_byte_ever(tmp_path: Path, count: int) -> None:
    began = time.monotonic()
    seed = int(began * 1000) & 0xFFFF
    print(f"seed {seed}", flush=True)
    soak = Soak(tmp_path, seed)
    try:
        facts = soak.run(count)
    finally:
        soak.close()
    say(facts, began)
    assert facts["restores"] == count
    assert facts.get("whole", 0) >= count // 4, facts
    assert facts.get("pager_killed", 0) + facts.get("holder_killed", 0) >= count // 10, facts
    assert facts.get("out_of_memory", 0) <= count // 4, facts
