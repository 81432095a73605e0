"""The node's threads are there from the start, and work finds one whatever the machine lacks later."""

from __future__ import annotations

import threading

import pytest

from relume.errors import HostError
from relume.node import threads


def test_all_of_them_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with threads.pool(4, "there") as pool:
        assert sum(each.name.startswith("there") for each in threading.enumerate()) == 4
        monkeypatch.setattr(threading.Thread, "start", _no_thread)
        assert [pool.submit(lambda: 7).result(5) for _ in range(8)] == [7] * 8


def test_too_many_are_said_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_two(thread: threading.Thread) -> None:
        if sum(each.name.startswith("few") for each in threading.enumerate()) == 2:
            _no_thread(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(HostError, match="can't start"):
        threads.pool(4, "few")


def _no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
