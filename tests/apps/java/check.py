"""A JVM: its compiler and collector threads, timers, a pool."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "Java 17 (HotSpot) HTTP server"
FAST = False


def check(app: Ask) -> object:
    first = app.json("/")
    assert first["rows"] == 200_000
    time.sleep(0.3)
    assert app.json("/")["ticks"] > first["ticks"], "timers run"
    return first["token"]
