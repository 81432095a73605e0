"""nginx: a master as root, workers as www-data, a zone of memory that they share."""

from __future__ import annotations

from ask import Ask

TITLE = "nginx, workers as www-data"
FAST = True


def check(app: Ask) -> object:
    token = app.get("/").decode().strip()
    assert len(token) == 32, token
    # The limit is counted in memory that the workers share: the second request is over it in each instance.
    assert app.status("/once") == 200
    assert app.status("/once") == 503
    return token
