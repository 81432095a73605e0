"""Which checkpoints go, by count and age."""

from __future__ import annotations

from typing import Any

from relume.node.retention import DAY_S, outlived

NOW = 1000 * DAY_S


def _row(checkpoint_id: str, days: float, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint_id": checkpoint_id,
        "app": "app",
        "platform": "p",
        "state": "ready",
        "created_at": NOW - days * DAY_S,
    } | more


def test_by_count_for_each_app_and_kind_of_machine() -> None:
    rows = [_row("old", 3), _row("new", 1), _row("middle", 2), _row("other", 9, app="other")]
    rows += [_row("arm", 8, platform="q")]
    assert set(outlived(rows, keep=2, keep_days=None, now=NOW)) == {"old"}
    assert set(outlived(rows, keep=1, keep_days=None, now=NOW)) == {"old", "middle"}
    assert outlived(rows, keep=None, keep_days=None, now=NOW) == {}


def test_by_age() -> None:
    rows = [_row("old", 3), _row("new", 1)]
    assert outlived(rows, keep=None, keep_days=2, now=NOW) == {"old": "it is 3.0 days old"}
    assert outlived(rows, keep=5, keep_days=0.5, now=NOW).keys() == {"old", "new"}


def test_what_is_not_ours_to_judge_stays() -> None:
    rows = [_row("new", 0), _row("making", 5, state="creating"), _row("foreign", 5, app=None)]
    rows += [_row("unread", 0, created_at=None)]
    assert outlived(rows, keep=1, keep_days=1, now=NOW) == {}
