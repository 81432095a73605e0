"""DuckDB: a database file held open and written on after the restore."""

from __future__ import annotations

from ask import Ask

TITLE = "DuckDB, file held open"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert (answer["total"], answer["visits"]) == (499_999_500_000, 1)
    assert app.json("/")["visits"] == 2
    return answer["token"]
