"""ClickHouse inside Python."""

from __future__ import annotations

from ask import Ask

TITLE = "ClickHouse in the process (chdb)"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert (answer["count"], answer["total"]) == (100_001, 4_999_950_000 + 1_000_000)
    return answer["token"]
