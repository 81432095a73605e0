"""Caddy: a Go program with its threads, configured in memory only."""

from __future__ import annotations

from ask import Ask

TITLE = "Caddy (Go)"
FAST = False


def check(app: Ask) -> object:
    tokens = {app.get("/").decode() for _ in range(10)}
    assert len(tokens) == 1
    token = tokens.pop()
    assert len(token) == 32
    return token
