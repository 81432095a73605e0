"""Ruby: puma in cluster mode."""

from __future__ import annotations

from ask import Ask

TITLE = "Ruby, puma with 2 workers"
FAST = False


def check(app: Ask) -> object:
    answers = [app.json("/") for _ in range(10)]
    assert all(answer["words"] == 200_000 and answer["last"] == "word 199999" for answer in answers)
    assert len({answer["token"] for answer in answers}) == 1
    return answers[0]["token"]
