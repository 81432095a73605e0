"""One program with every kind of timer, limit, watch, lock and child; a look at all of them ends without an error."""

from __future__ import annotations

from ask import Ask

TITLE = "timers, limits, terminal, watches, children in every state"
FAST = True


def check(app: Ask) -> object:
    return app.json("/")["token"]
