"""When instances are prepared, and what they give way to. Those here are only a build and a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from relume.errors import EngineError
from relume.linux.memory import Memory
from relume.node import prepared as module
from relume.node.prepared import Prepared


def build(number: int, wished: int = 1) -> Any:
    config = {"relume": {"checkpoint": {"prepared": wished}}}
    return SimpleNamespace(app="app", build_id=f"build-{number}", config=config)


def checkpoint(number: int) -> Any:
    return SimpleNamespace(checkpoint_id=f"cp-{number}")


class Node:
    """Makes and discards at once, and remembers."""

    def __init__(self) -> None:
        self.current: tuple[Any, Any] | None = (build(1), checkpoint(1))
        self.max_age = 300.0
        self.fails = False
        self.made: list[Any] = []
        self.discarded: list[Any] = []
        self.prepared = Prepared(current=lambda _: self.current, prepare=self.make, discard=self.discard)

    async def make(self, build: Any, checkpoint: Any) -> Any:
        instance = SimpleNamespace(
            build=build,
            checkpoint_id=checkpoint.checkpoint_id,
            ended=asyncio.Event(),
            settings=SimpleNamespace(prepared_max_age=self.max_age),
        )
        self.made.append(instance)
        if self.fails:
            raise EngineError("no")
        return instance

    async def discard(self, instance: Any) -> None:
        self.discarded.append(instance)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110  (nobody tells)
                await asyncio.sleep(0.005)

    async def some_rounds(self) -> None:
        await asyncio.sleep(10 * module._TICK)


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Gigabytes that the machine has to spare, of 100."""
    there = {"gb": 50}
    monkeypatch.setattr(module.memory, "machine", lambda: Memory(100 << 30, there["gb"] << 30))
    return there


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch, available: dict[str, int]) -> AsyncIterator[Node]:
    monkeypatch.setattr(module, "_TICK", 0.02)
    node = Node()
    tending = asyncio.create_task(node.prepared.run())
    yield node
    tending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tending


async def test_one_is_made_behind_the_one_that_is_taken(node: Node) -> None:
    await node.some_rounds()
    assert node.made == [], "nobody has started the app"
    node.prepared.want("app")
    await node.until(lambda: len(node.made) == 1)
    await node.some_rounds()
    assert len(node.made) == 1
    assert node.prepared.take(build(2), checkpoint(1)) is None
    assert node.prepared.take(build(1), checkpoint(2)) is None
    assert node.prepared.take(build(1), checkpoint(1)) is node.made[0]
    await node.until(lambda: len(node.made) == 2)
    await node.prepared.forget("app")
    assert node.discarded == [node.made[1]]


@pytest.mark.parametrize(
    "current", [(build(2), checkpoint(1)), (build(1), checkpoint(2))], ids=["build", "checkpoint"]
)
async def test_it_gives_way_to_another(node: Node, current: tuple[Any, Any]) -> None:
    node.prepared.want("app")
    await node.until(lambda: len(node.made) == 1)
    node.current = current
    await node.until(lambda: len(node.made) == 2)
    assert node.discarded == [node.made[0]]
    assert node.prepared.take(*current) is node.made[1]


async def test_it_goes_when_its_checkpoint_no_longer_fits(node: Node) -> None:
    """Removed, quarantined, or of another platform than this machine's now: there is nothing to prepare."""
    node.prepared.want("app")
    await node.until(lambda: len(node.made) == 1)
    node.current = None
    await node.until(lambda: node.discarded == node.made)
    await node.some_rounds()
    assert len(node.made) == 1


async def test_it_gives_way_to_memory_pressure_and_stays_away(
    node: Node, available: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AFTER_SCARCITY", 3600.0)
    node.prepared.want("app")
    await node.until(lambda: len(node.made) == 1)
    available["gb"] = 9
    await node.until(lambda: node.discarded == node.made)
    available["gb"] = 11  # just what was given up: whoever needed it has not taken it yet
    await node.some_rounds()
    assert len(node.made) == 1
    node.prepared._not_before.clear()
    await node.until(lambda: len(node.made) == 2)


async def test_one_that_ended_or_is_old_is_made_anew(node: Node) -> None:
    node.prepared.want("app")
    await node.until(lambda: len(node.made) == 1)
    node.made[0].ended.set()
    assert node.prepared.take(build(1), checkpoint(1)) is None
    node.max_age = 0.0
    await node.until(lambda: len(node.discarded) >= 2)
    assert node.discarded[:2] == node.made[:2]


async def test_what_fails_is_not_tried_without_end(node: Node) -> None:
    node.fails = True
    node.prepared.want("app")
    await node.until(lambda: len(node.made) == 1)
    await node.some_rounds()
    assert len(node.made) == 1
