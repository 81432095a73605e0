"""A request from a grandchild whose parent has gone: it is answered in the original, cut in the copies."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "request from an orphaned grandchild"
FAST = False


def check(app: Ask) -> object:
    deadline = time.monotonic() + 10
    while not (answer := app.json("/"))["told"]:
        assert time.monotonic() < deadline, "the grandchild never came back from its request"
        time.sleep(0.1)
    app.drawn.setdefault("told", set()).add(answer["told"])
    # The original is asked first.
    assert (answer["told"] == 1) == (app.drawn["told"] == {1})
    return answer["token"]
