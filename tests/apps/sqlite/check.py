"""SQLite with its write-ahead log, held open."""

from __future__ import annotations

from ask import Ask

TITLE = "SQLite (WAL), held open"
FAST = True


def check(app: Ask) -> object:
    answer = app.json("/")
    assert (answer["new"], answer["total"], answer["sound"]) == (1, 20_001, "ok")
    assert app.json("/")["new"] == 2
    return answer["token"]
