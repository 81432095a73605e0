"""supervisord as the container's first process: its socket is a hard link, of which the bound name is gone."""

from __future__ import annotations

from ask import Ask

TITLE = "supervisord with Redis and a web server"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert answer["running"] == 2
    assert app.json("/restart")["restarted"].count("redis: ") == 2  # stopped, started
    return answer["token"]
