"""PostgreSQL, its background processes, and a session with a temporary table."""

from __future__ import annotations

from ask import Ask

TITLE = 'PostgreSQL, filesystem = "all"'
FAST = False


def check(app: Ask) -> object:
    first = app.json("/")
    assert (first["visits"], first["seen"]) == (1, 1), "rows of this instance's own"
    assert app.json("/")["seen"] == 2
    return first["token"]
