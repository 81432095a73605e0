"""asyncio: children behind pipes, a watcher for their end, timers, signal handlers."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "asyncio subprocesses"
FAST = False


def check(app: Ask) -> object:
    first = app.json("/a")
    token, lines = first["child"]
    assert lines == "2", "the child counts on from its first line"
    time.sleep(0.2)
    second = app.json("/signal")
    assert second["ticks"] > first["ticks"]
    assert second["signals"] == 1
    assert app.json("/kill")["exit"] == -9, "the end of a child is noticed"
    return token
