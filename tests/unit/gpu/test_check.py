"""script/gpu-check: its lines with the fake driver, and what it says where there is nothing to check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[3] / "script/gpu-check"


def run(*arguments: str, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    # No CRIU: the container step is tests/e2e's. What else the machine has must not matter.
    environment = {**os.environ, "RELUME_PYTHON": sys.executable, "RELUME_CRIU": "/nonexistent/criu", **env}
    done = subprocess.run(
        [SCRIPT, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {line.pop("step"): line for line in lines}


def test_with_the_fake_driver() -> None:
    status, steps = run("--fake", "--size", "0.01")
    assert status == 0 and list(steps) == ["versions", "plain", "graphs", "move", "container", "paged"]
    assert all(step["fake"] for step in steps.values())
    for name in ("plain", "graphs", "move"):
        assert steps[name]["ok"] and steps[name]["content_equal"], steps[name]
        assert steps[name]["host_bytes"] >= steps[name]["bytes"] > 0.9 * 0.01 * 2**30
        assert steps[name]["checkpoint_rate"] > 0 and steps[name]["pinned_to_host_rate"] > 0
        assert steps[name]["registered_memory_equal"]
    assert steps["graphs"]["graph_runs_on"] and steps["graphs"]["kernel_runs_on"]
    assert steps["graphs"]["blocks"] == 96
    for name in ("container", "paged"):
        assert steps[name]["ok"] is None
        assert any("CRIU 4.2" in thing for thing in steps[name]["missing"])


def test_a_python_without_the_libraries_is_named() -> None:
    bare = os.path.realpath(sys.executable)
    done = subprocess.run(
        [SCRIPT], env={"PATH": "/nonexistent:/usr/bin:/bin", "RELUME_PYTHON": bare, "HOME": "/"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    (line, *_rest) = map(json.loads, done.stdout.splitlines())  # no traceback, whichever Python it took
    assert line["step"] == "versions"


def test_without_a_gpu_every_step_says_what_is_missing(no_gpu: dict[str, str], tmp_path: Path) -> None:
    status, steps = run("--cdi", str(tmp_path / "none"), LD_LIBRARY_PATH=no_gpu["LD_LIBRARY_PATH"])
    assert status == 3
    assert all(step["ok"] is None and step["missing"] for step in steps.values())
    assert not any("fake" in step for step in steps.values())
    assert any("libcuda" in thing for thing in steps["plain"]["missing"])
    lacking = steps["container"]["missing"]
    assert any("CRIU 4.2" in thing for thing in lacking)
    assert any("nvidia-ctk cdi generate" in thing for thing in lacking)
    assert ("root" in lacking) == (os.geteuid() != 0)
