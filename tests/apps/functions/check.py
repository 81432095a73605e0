"""main.py with functions, served by relume's runner; module-level request with the published snippet."""

from __future__ import annotations

import json

from ask import Ask

TITLE = "main.py functions (relume's runner)"
FAST = True


def check(app: Ask) -> object:
    answer = app.json("/predict", {"item": {"name": "you"}, "n": 999_999})
    result = answer["result"]
    assert set(answer) == {"run_id", "result", "run_time_ms"}
    assert (result["hello"], result["square"], result["asked"]) == ("you", 999_999**2, 1)
    assert app.json("/later", {"seconds": 0.01})["result"] == result["token"]
    events = app.get("/stream", b'{"upper": 3}').decode().strip().split("\n\n")
    assert [json.loads(event.removeprefix("data: "))["n"] for event in events] == [0, 1, 2]
    assert app.status("/predict", b'{"nobody": 1}') == 422
    assert app.status("/breaks", b"{}") == 500
    for generator, drawn in app.json("/draw", {})["result"].items():
        app.unique(generator, drawn)
    return result["token"]
