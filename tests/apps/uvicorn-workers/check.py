"""uvicorn[standard] with two workers: uvloop, a supervisor with pipes to its children."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "uvicorn[standard], 2 workers"
FAST = True


def check(app: Ask) -> object:
    tokens: set[str] = set()
    deadline = time.monotonic() + 60
    while len(tokens) < 2:
        assert time.monotonic() < deadline, f"both workers must answer, there are {tokens}"
        tokens.add(app.json("/token")["token"])
    return sorted(tokens)
