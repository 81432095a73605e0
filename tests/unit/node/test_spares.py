"""Keepers that wait. The keepers here are fakes: what counts is what happens when real ones fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from relume.engine.jobs import Container
from relume.keeper.client import KeeperLost
from relume.node import spares as module
from relume.node.places import Places
from relume.node.spares import Spares
from relume.runc import Runc


class Ground:
    """Remembers what was prepared and not cleared."""

    def __init__(self) -> None:
        self.there: set[str] = set()

    def prepare(self, places: Any) -> None:
        self.there.add(places.runtime.name)

    def clear(self, places: Any, instance_id: str) -> None:
        assert places.runtime.name == instance_id
        self.there.discard(instance_id)


class FakeZygote:
    """Forks nothing."""

    async def spawn(self, container: Container) -> int:
        return 1

    async def close(self) -> None:
        pass


class FakeKeeper:
    """Comes up at once, or when ``gate`` opens, or (``broken``) never."""

    made: list[FakeKeeper]
    gate: asyncio.Event
    broken: bool

    def __init__(self, container: Container, on_event: Any) -> None:
        self.container = container
        self.lost = asyncio.Event()
        self.ended = self.closed = self.connected = False
        self.made.append(self)

    async def connect(self) -> dict[str, Any]:
        await self.gate.wait()
        if self.broken:
            raise KeeperLost("it does not answer")
        self.connected = True
        return {}

    async def end(self) -> None:
        self.ended = True

    async def close(self) -> None:
        self.closed = True


async def take(spares: Spares) -> Any:
    keeper = spares.take()
    await spares.bring_up(keeper)
    return keeper


class Bench:
    """Spares of ``count`` on a fake ground."""

    def __init__(self, count: int) -> None:
        self.ground = Ground()
        runc = Runc(Path("/bin/runc"), Path("/r"), Path("/c"))
        places = Places(Path("/state"), "n1")
        self.spares = Spares(places, self.ground, runc, FakeZygote(), outgoing=False, count=count)  # type: ignore[arg-type]


@pytest.fixture
def keepers(monkeypatch: pytest.MonkeyPatch) -> type[FakeKeeper]:
    FakeKeeper.made = []
    FakeKeeper.gate = asyncio.Event()
    FakeKeeper.gate.set()
    FakeKeeper.broken = False
    monkeypatch.setattr(module, "Keeper", FakeKeeper)
    return FakeKeeper


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_that_waits_is_taken_and_no_other_is_made(keepers: type[FakeKeeper]) -> None:
    bench = Bench(2)
    bench.spares.refill()
    bench.spares.refill()  # those in the making count
    await settle()
    assert len(keepers.made) == 2
    taken = await take(bench.spares)
    assert taken in keepers.made and len(keepers.made) == 2
    bench.spares.refill()
    await settle()
    assert len(keepers.made) == 3
    await bench.spares.close()
    assert bench.ground.there == {taken.container.instance_id}
    assert [keeper.ended for keeper in keepers.made].count(False) == 1


async def test_ids_are_unique_and_the_places_are_the_nodes(keepers: type[FakeKeeper]) -> None:
    bench = Bench(0)
    containers = [(await take(bench.spares)).container for _ in range(20)]
    assert len({container.instance_id for container in containers}) == 20
    assert all(container.cgroup == f"/relume/n1/{container.instance_id}" for container in containers)
    await bench.spares.close()


async def test_one_that_died_while_it_waited_is_cleared_away(keepers: type[FakeKeeper]) -> None:
    bench = Bench(1)
    bench.spares.refill()
    await settle()
    dead = keepers.made[0]
    dead.lost.set()
    taken = await take(bench.spares)
    assert taken is not dead
    assert bench.ground.there == {taken.container.instance_id}
    await bench.spares.close()


async def test_a_failure_leaves_nothing_and_is_told(
    keepers: type[FakeKeeper], caplog: pytest.LogCaptureFixture
) -> None:
    keepers.broken = True
    bench = Bench(1)
    bench.spares.refill()
    await settle()
    assert "it does not answer" in caplog.text
    with pytest.raises(KeeperLost):
        await take(bench.spares)
    failed = keepers.made[-1].container.instance_id
    assert bench.ground.there == {failed}, "what was taken is its taker's to clear away"
    keepers.broken = False
    taken = await take(bench.spares)
    assert bench.ground.there == {failed, taken.container.instance_id}
    await bench.spares.close()


async def test_close_while_one_is_being_made(keepers: type[FakeKeeper]) -> None:
    keepers.gate.clear()
    bench = Bench(1)
    bench.spares.refill()
    await settle()
    assert bench.ground.there
    await bench.spares.close()
    assert bench.ground.there == set()


async def test_none_is_made_after_close(keepers: type[FakeKeeper]) -> None:
    """A refill that take() had planned for a moment later must not start a keeper that nobody ends."""
    bench = Bench(1)
    await bench.spares.close()
    bench.spares.refill()
    await settle()
    assert keepers.made == []
