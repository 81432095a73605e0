"""main.py functions, checkpointed when ready: the runner notices the restore at its first request."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "main.py functions, checkpoint at ready"
FAST = False


def check(app: Ask) -> object:
    for generator, drawn in app.json("/draw", {})["result"].items():
        app.unique(generator, drawn)
    first = app.json("/remember", {})["result"]
    time.sleep(0.2)
    assert app.json("/remember", {})["result"]["ticks"] > first["ticks"], "threads run"
    return first["token"]
