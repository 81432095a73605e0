"""The oldest CRIU that will do is the same one wherever it is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from relume.gpu import check_container
from relume.node import doctor

ROOT = Path(__file__).parents[3]


def sourced(command: str) -> subprocess.CompletedProcess[str]:
    """``command`` in a shell that has read script/lib/common.sh."""
    script = f"set -euo pipefail; . {ROOT}/script/lib/common.sh; {command}"
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_the_minimum_is_one() -> None:
    minimum = sourced('echo "$CRIU_MINIMUM"').stdout.strip()
    parts = tuple(int(part) for part in minimum.split("."))
    assert parts == doctor.CRIU_MINIMUM == check_container._MIN_CRIU
    assert (
        f"takes the distribution's CRIU where it is {minimum} or newer"
        in (ROOT / "docs/using.md").read_text()
    )


@pytest.mark.parametrize(
    ("version", "enough"),
    [("3.17.1", False), ("4.1.1", False), ("4.2", True), ("4.2.1", True), ("4.10", True)],
)
def test_what_bootstrap_takes_of_a_distribution(version: str, enough: bool) -> None:
    assert (sourced(f'at_least "$CRIU_MINIMUM" {version}').returncode == 0) is enough
