"""ONNX Runtime: a session and its threads."""

from __future__ import annotations

from ask import Ask

TITLE = "ONNX Runtime session"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert answer["same"], "bit for bit"
    return answer["token"]
