"""The part of a dump that is ours, with the gate and the container stood in for."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.engine import criu
from relume.engine.criu import Criu
from relume.engine.held import HeldReport
from relume.engine.jobs import DumpJob

JOB = DumpJob("d1", "/i", "/w", "/h", "/u", 1, "", 1, False, 10.0)


class StandingGate:
    """A gate at which CRIU has arrived; ``released`` is what it was told."""

    def __init__(self) -> None:
        self.released: list[bool] = []

    async def arrival(self) -> bytes:
        return b"post-dump"

    def release(self, *, ok: bool = True) -> None:
        self.released.append(ok)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Criu:
    monkeypatch.setattr(criu.cgroup, "processes", lambda group: [])
    engine = Criu.__new__(Criu)
    engine._container = cast("Any", SimpleNamespace(cgroup="/relume-none"))
    engine._directory = tmp_path
    return engine


def test_whatever_fails_while_all_is_frozen_lets_the_app_go(
    engine: Criu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(pids: object) -> None:
        raise ValueError("a thread with an odd name")

    monkeypatch.setattr(criu.held, "capture", lambda *_, **__: HeldReport(0, 0))
    monkeypatch.setattr(criu.affinity, "read", odd)
    gate = StandingGate()
    with pytest.raises(ValueError, match="odd name"):
        asyncio.run(engine._copy_held(cast("Any", gate), JOB))
    assert gate.released == [False]


def test_who_clears_up_after_a_dump_finds_nobody_copying(
    engine: Criu, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def copying(*_: object, abandoned: Any, **__: object) -> HeldReport:
        begun.set()
        while not abandoned():
            pass
        ended.set()
        raise RuntimeError

    async def story() -> None:
        task = asyncio.create_task(engine._copy_held(cast("Any", gate), JOB))
        await asyncio.to_thread(begun.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    monkeypatch.setattr(criu.held, "capture", copying)
    gate = StandingGate()
    asyncio.run(story())
    assert gate.released == [False]
