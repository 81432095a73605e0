"""multiprocessing: spawn, Queue, Value, SharedMemory, Pool; the snippet that published examples use."""

from __future__ import annotations

from ask import Ask

TITLE = "multiprocessing: spawn, Queue, SharedMemory, Pool"
FAST = True


def check(app: Ask) -> object:
    first = app.json("/one")
    token, task, count = first["worker"]
    assert (task, count) == ("/one", 2), "the worker counts on from its one warm-up task"
    assert first["shared"] == token
    assert first["pool"] == [x * x for x in range(100)]
    assert app.json("/two")["worker"] == [token, "/two", 3]
    return token
