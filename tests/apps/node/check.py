"""Node: event loop, timers, a worker thread; fetch() makes the request."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "Node.js, worker thread"
FAST = False


def check(app: Ask) -> object:
    first = app.json("/")
    assert first["count"] == 2, "the worker counts on from its one warm-up message"
    time.sleep(0.2)
    assert app.json("/")["ticks"] > first["ticks"], "timers run"
    return first["token"]
