"""uvicorn[standard] with two workers: uvloop, a supervisor with pipes to its children."""

from __future__ import annotations

from ask import Ask

TITLE = "uvicorn[standard], 2 workers"
FAST = True


def check(app: Ask) -> object:
    tokens: set[str] = set()
    for _ in range(300):
        tokens.add(app.json("/token")["token"])
        if len(tokens) == 2:
            break
    assert len(tokens) == 2, f"both workers must answer, there are {tokens}"
    return sorted(tokens)
