"""MariaDB: InnoDB with its files open, and a table in memory."""

from __future__ import annotations

from ask import Ask

TITLE = 'MariaDB, filesystem = "all"'
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert (answer["rows"], answer["first"]) == (2, "first")
    return answer["token"]
