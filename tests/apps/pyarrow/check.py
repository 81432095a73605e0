"""pyarrow: a table in memory, thread pools, a mapped file."""

from __future__ import annotations

from ask import Ask

TITLE = "pyarrow, memory-mapped file"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    rows = answer["rows"]
    assert answer["mapped"] == rows * (rows - 1) // 2
    assert answer["groups"] == [sum(range(group, rows, 7)) for group in range(7)]
    return answer["token"]
