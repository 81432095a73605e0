"""PHP-FPM behind nginx: a unix socket between them, shared memory between the workers."""

from __future__ import annotations

from ask import Ask

TITLE = "PHP-FPM with APCu, behind nginx"
FAST = False


def check(app: Ask) -> object:
    first = app.json("/")
    # The token was made by the readiness probe's request, before the checkpoint.
    assert first["visits"] >= 2
    assert app.json("/")["visits"] > first["visits"]
    return first["token"]
