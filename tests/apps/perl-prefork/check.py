"""Perl: a preforking server that counts in a locked file."""

from __future__ import annotations

from ask import Ask

TITLE = "Perl, preforked, locked file"
FAST = False


def check(app: Ask) -> object:
    answers = [app.json("/") for _ in range(10)]
    assert [answer["count"] for answer in answers] == list(range(1, 11)), "a count of this instance's own"
    assert all(answer["row"] == "row 100000" for answer in answers)
    return answers[0]["token"]
