"""granian: workers whose event loop and HTTP server are Rust; checkpointed when ready."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "granian (Rust HTTP server), 2 workers"
FAST = False


def check(app: Ask) -> object:
    answers = []
    deadline = time.monotonic() + 60
    while len({answer["pid"] for answer in answers}) < 2:
        assert time.monotonic() < deadline, f"only one of two workers answers: {answers[-1]}"
        answers.append(app.json("/"))
    assert len({answer["token"] for answer in answers}) == 1
    return answers[0]["token"]
