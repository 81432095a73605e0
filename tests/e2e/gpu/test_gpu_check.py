"""The GPU path through real runc and CRIU, with the fake driver: from the checkout, and from the bundle that goes to a
machine without a network. The dump holds the device memory, and the copy gets it back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def check(root: Path, python: str) -> dict[str, Any]:
    """The container steps' lines of ``script/gpu-check --fake``, with everything else right too."""
    done = subprocess.run(
        [root / "script/gpu-check", "--fake"],
        env={"PATH": os.environ["PATH"], "RELUME_PYTHON": python},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and all(line["ok"] for line in lines), lines
    container, paged = lines[-2:]
    assert (container["step"], paged["step"]) == ("container", "paged")
    assert paged["content_equal_in_copy"] and paged["registered_memory_equal"]
    assert paged["paged_bytes"] > 0.9 * paged["bytes"]
    return dict(container)


def test_a_container_and_its_copy() -> None:
    container = check(ROOT, sys.executable)
    assert container["original_goes_on"] and container["content_equal_in_copy"]
    assert container["image_bytes"] > container["bytes"]
    assert "relume-gpu" not in Path("/proc/self/mountinfo").read_text()


def test_the_bundle_needs_nothing_but_python(tmp_path: Path) -> None:
    packed = subprocess.run(
        [ROOT / "script/gpu-bundle", tmp_path / "b.tar.gz"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert json.loads(packed.stdout)["bytes"] < 60_000_000
    subprocess.run(["tar", "-C", tmp_path, "-xzf", tmp_path / "b.tar.gz"], check=True)
    bare = Path(os.path.realpath(sys.executable))
    probe = subprocess.run([bare, "-c", "import pynvml"], capture_output=True, check=False)
    if probe.returncode == 0:
        pytest.fail(
            f"{bare} has our libraries itself, so this would prove nothing; run it from the virtual environment"
        )
    container = check(tmp_path / "relume-gpu", str(bare))
    assert container["content_equal_in_copy"]
