"""Why a copy did not come up: what it may have missed is said with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.checkpoint.shelf import Checkpoint
from relume.node.failures import _missed


def checkpoint(**left_behind: Any) -> Checkpoint:
    return cast("Checkpoint", SimpleNamespace(left_behind=left_behind))


@pytest.mark.parametrize(
    ("left_behind", "said"),
    [
        ({}, ""),
        ({"count": 5, "cache_count": 5, "names": ["/root/.cache/1"]}, ""),
        (
            {"count": 2, "cache_count": 1, "names": ["/run/pid", "/root/.cache/1"]},
            "(1 in all)",
        ),
        ({"count": 2, "cache_count": 1, "names": ["/run/pid", "/root/.cache/1"]}, ": /run/pid (1"),
        ({"count": 3, "cache_count": 0, "names": ["/a", "/b", "/c"]}, ": /a, /b, /c (3 in all)"),
        (
            {"count": 12, "cache_count": 0, "names": [f"/{n}" for n in range(10)]},
            ": /0, /1, /2, ... (12 in all)",
        ),
    ],
)
def test_files_that_were_left_behind_are_named(left_behind: dict[str, Any], said: str) -> None:
    words = _missed(checkpoint(**left_behind))
    assert said in words
    assert bool(words) == bool(said)
    assert not words or 'filesystem = "all"' in words
