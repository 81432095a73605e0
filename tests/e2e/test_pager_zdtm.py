"""CRIU's own test suite, its selection for lazy restores, with our pager in the place of CRIU's daemon."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root")
@pytest.mark.timeout(600)
def test_the_lazy_selection_passes() -> None:
    done = subprocess.run([ROOT / "script" / "zdtm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    name, passed, _, failed, _ = done.stdout.splitlines()[-1].replace(",", "").split()
    assert (name, failed) == ("relume:", "0")
    assert int(passed) >= 13
