"""A static Rust binary, built by Debian's rustc: threads over a channel, and a monotonic clock."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "Rust, static binary"
FAST = False


def check(app: Ask) -> object:
    first = app.json("/")
    assert (first["square"], first["count"]) == (999_999**2, 2), "the thread counts on from its one warm-up"
    time.sleep(0.2)
    second = app.json("/")
    assert second["ticks"] > first["ticks"], "threads sleep and wake"
    assert 0.2 <= second["up_s"] - first["up_s"] < 30
    return first["token"]
