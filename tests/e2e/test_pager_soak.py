"""Restores under memory pressure, with pager or holder killed at random: no wrong byte, nobody left hanging.

``script/test`` makes 20 of them; ``script/test --all`` makes 500, or as many as RELUME_SOAK says:

    .venv/bin/python -m pytest tests/e2e/test_pager_soak.py -m slow -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pager.harness import ROOT


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
    # In a pid namespace of its own: CRIU gives processes the pids they had, and others must not have taken them.
    command = [
        "unshare",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-m",
        "pager.soak",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}/tests"}
    said = []
    with subprocess.Popen(
        [*command, str(tmp_path), str(count)], env=environment, stdout=subprocess.PIPE, text=True
    ) as soak:
        assert soak.stdout is not None
        for line in soak.stdout:
            print(line, end="", flush=True)
            said.append(line)
    assert soak.returncode == 0, "see the lines above"
    facts = json.loads(said[-1])
    assert facts["restores"] == count
    assert facts.get("whole", 0) >= count // 4, facts
    # A fifth of them is killed in time, by chance: of twenty it may be none.
    assert facts.get("pager_killed", 0) + facts.get("holder_killed", 0) >= count // 25, facts
    assert facts.get("out_of_memory", 0) <= count // 4, facts
