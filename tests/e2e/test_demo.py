"""script/demo as a person runs it: its last line, its exit status, and that Ctrl-C leaves nothing behind.

The program looks for what it left by itself and fails then, so its exit status says that too.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "script/demo"

pytestmark = pytest.mark.timeout(900)  # the first run makes a base and installs JAX


def test_the_demo_ends_with_one_line_of_json() -> None:
    done = subprocess.run([DEMO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"app", "cold_s", "restored_s", "ratio"}
    assert result["cold_s"] > 5
    assert result["ratio"] == pytest.approx(result["cold_s"] / result["restored_s"], rel=0.05)
    assert result["ratio"] > 1
    assert "same answer" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_takes_everything_down(number: signal.Signals) -> None:
    with subprocess.Popen([DEMO], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        said = []
        for line in demo.stderr:
            said.append(line)
            if line.startswith("First start"):
                demo.send_signal(number)
        assert demo.wait() == 130, "".join(said)
        assert demo.stdout is not None and demo.stdout.read() == ""
    assert "everything was taken down" in said[-1]
