"""The SDK: a hook that raises, a request from a thread, a second request, and what each world is told."""

from __future__ import annotations

from ask import Ask

TITLE = "relume's SDK: hooks, threads, two requests"
FAST = True


def check(app: Ask) -> object:
    answer = app.json("/")
    refused, first, second = answer["results"]
    assert refused == ["failed", "hook", False, None]
    if first[0] == "created":
        assert second[:3] == ["skipped", "exists", False]
        assert answer["hooks"] == ["before"] * 3
    else:
        restore_id = first[3]
        app.unique("restore_id", restore_id)
        assert first == ["restored", "", True, restore_id]
        assert second == ["skipped", "restored", False, restore_id]
        assert answer["hooks"] == ["before", "before", "after", "before"]
    return answer["token"]
