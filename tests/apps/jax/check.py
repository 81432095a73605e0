"""JAX: a jit-compiled function is called and not compiled again."""

from __future__ import annotations

from ask import Ask

TITLE = "JAX, jit-compiled function"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert answer["same"]
    assert answer["compiled"] == 1
    return answer["token"]
