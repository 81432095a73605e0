"""`relume bench` on a real node of its own: the rows, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FIELDS = {
    "workload",
    "way",
    "cache",
    "first_answer_s",
    "runs",
    "spread",
    "image_bytes",
    "touched_bytes",
    "frozen_s",
}
CACHE = Path("/var/cache/relume/bench")


def bench(*arguments: str) -> list[dict[str, Any]]:
    before = {path.name for path in CACHE.glob("state-*")}
    command = [sys.executable, "-m", "relume.cli.main", "bench", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    left = [path for path in CACHE.glob("state-*") if path.name not in before]
    assert left == []
    mounts = Path("/proc/self/mountinfo").read_text()
    assert not [line for line in mounts.splitlines() if f"{CACHE}/state-" in line and "/bench-" in line]
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_tiny_one_run() -> None:
    ways = ["cold", "criu-eager", "criu-lazy", "first", "learned"]
    rows = bench("--workload", "tiny", "--runs", "1", "--cache", "warm", "--way", *ways)
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["workload"] == "tiny"
        assert row["cache"] == "warm"
        assert 0 < row["spread"][0] <= row["first_answer_s"] <= row["spread"][1]
        assert 0 < row["touched_bytes"] < row["image_bytes"]
        assert row["frozen_s"] > 0
    memory = {row["way"]: row["memory"] for row in rows}
    assert memory == {
        "cold": "fresh",
        "criu-eager": "eager: asked for",
        "criu-lazy": "paged",
        "first": "paged",
        "learned": "paged",
    }


def test_tiny_clones() -> None:
    (row,) = bench("--workload", "tiny", "--runs", "1", "--clones", "2", "--way", "learned")
    assert row["clones"] == 2
    assert row["fill"] == "demand"
    assert 0 < row["first_answer_s"] <= row["last_answer_s"]
    assert 0 < row["pss_bytes"] < row["image_bytes"] * 2
    assert row["cgroup_bytes"] > 0


@pytest.mark.slow
def test_region() -> None:
    """The crowd's is not the tiny one: of its set a single page that was not learned, a chunk, is half."""
    rows = bench("--region", *("--workload", "tiny", "python-web"), "--nodes", "2", "--runs", "1")
    kinds = ["upload", "download", "first-answer", "first-answer, limited", "crowd"]
    assert [row["row"] for row in rows] == kinds
    for row in rows:
        assert row["seconds"] > 0
        assert all(goal["ratio"] in row for goal in row["goals"])
    crowd = rows[-1]
    assert (crowd["wrong_answers"], crowd["checkpoints_made"], crowd["restored"]) == (0, 1, 2)
    assert crowd["bytes_ratio"] <= 1.2
