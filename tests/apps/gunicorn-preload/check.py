"""gunicorn --preload: pages shared by fork, workers as www-data, unlinked heartbeat files."""

from __future__ import annotations

from ask import Ask

TITLE = "gunicorn --preload, 2 workers as www-data"
FAST = True


def check(app: Ask) -> object:
    answers = [app.json("/") for _ in range(20)]
    assert all(answer["uid"] == 33 for answer in answers)
    assert all(answer["rows"] == 300_000 and answer["last"] == "299999" * 20 for answer in answers)
    return answers[0]["token"]
