"""Taking over what an earlier run left: a keeper that is slow to answer is none that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.engine.jobs import Container
from relume.keeper.client import KeeperLost
from relume.node import adoption as module
from relume.node.adoption import Adoption
from relume.node.background import Background
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.settings import Settings
from unit.node.conftest import BUILD, SETTINGS, FakeKeeper

CONTAINER = Container("i-1", "/r", "/runc", "/root", "/criu", "/relume/n/i-1", outgoing=False)
TOLD = {
    "phase": "ready",
    "port": 4711,
    "ready_at": 1.0,
    "requests": [],
    "dump": None,
    "given": {"TOKEN": "t"},
}


class SlowKeeper(FakeKeeper):
    """Says what ``answer`` will hold."""

    answer: asyncio.Future[dict[str, Any]]

    async def connect(self, *, patience: float) -> dict[str, Any]:
        return await self.answer


class Node:
    """What is known of the one instance of an earlier run."""

    def __init__(self, places: Places) -> None:
        self.saved: list[str] = []
        self.roster = SimpleNamespace(instances={}, save=lambda instance: self.saved.append(instance.state))
        self.ended: list[str] = []
        self.heard: list[str] = []
        self.background = Background()
        ending = SimpleNamespace(discard=self._discard, forget=self._forget)
        self.events: list[dict[str, Any]] = []
        hearing = SimpleNamespace(
            listen=lambda instance: self.heard.append(instance.instance_id),
            heard=lambda instance, event: self.events.append(event),
        )
        nobody = cast("Any", None)
        self.adoption = Adoption(
            places,
            cast("Any", self.roster),
            cast("Any", SimpleNamespace(unfinished=list)),
            nobody,
            nobody,
            self.background,
            hearing=cast("Any", hearing),
            ending=cast("Any", ending),
            requests=nobody,
            failures=nobody,
        )

    async def _discard(self, instance: Instance, state: str) -> None:
        self.ended.append(state)

    async def _forget(self, instance: Instance) -> None:
        self.ended.append("forgotten")

    async def adopt(self, state: str = "ready") -> bool:
        facts = {"id_base": 1, "restored": True, "checkpoint_id": "cp-1", "deferred": False, "maker": False}
        facts |= {"port": 4711, "gpu": None, "container": vars_of(CONTAINER)}
        row = {"instance_id": "i-1", "state": state, "started_at": 1.0, "facts": facts}
        return await self.adoption.adopt(row, BUILD)


def vars_of(container: Container) -> dict[str, Any]:
    return {name: getattr(container, name) for name in container.__dataclass_fields__}


@pytest.fixture
async def answer(monkeypatch: pytest.MonkeyPatch) -> asyncio.Future[dict[str, Any]]:
    SlowKeeper.answer = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(module, "Keeper", SlowKeeper)
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    monkeypatch.setattr(Settings, "of", lambda build: SETTINGS)
    return SlowKeeper.answer


@pytest.fixture
async def node(places: Places) -> Node:
    return Node(places)


async def test_one_that_answers_is_taken_over(node: Node, answer: asyncio.Future[dict[str, Any]]) -> None:
    answer.set_result(TOLD)
    assert await node.adopt()
    adopted = node.roster.instances["i-1"]
    assert (adopted.state, adopted.url) == ("ready", "http://127.0.0.1:4711")
    assert adopted.environment == {"TOKEN": "t"}, "whoever takes its place gets what its caller gave"
    assert node.heard == ["i-1"]


async def test_what_it_has_become_is_written_down(node: Node, answer: asyncio.Future[dict[str, Any]]) -> None:
    """Ready since the node ended, or taken by a start just before: a row that says less would lose its log."""
    answer.set_result(TOLD)
    assert await node.adopt("prepared")
    assert node.saved == ["ready"]


async def test_one_that_is_being_prepared_is_made_anew(
    node: Node, answer: asyncio.Future[dict[str, Any]]
) -> None:
    """Nobody will ever let it run."""
    answer.set_result(TOLD | {"phase": "starting", "ready_at": None, "stopped": True})
    assert not await node.adopt("starting")
    assert node.roster.instances == {}


async def test_how_one_ended_is_asked_of_its_keeper(
    node: Node, answer: asyncio.Future[dict[str, Any]], places: Places
) -> None:
    """Where it could not write that down."""
    answer.set_result(TOLD | {"phase": "exited", "exit_code": 3})
    assert not await node.adopt()
    assert node.adoption.exit_code("i-1") == 3
    assert node.adoption.exit_code("i-2") is None
    places.instance("i-2").kept.mkdir(parents=True)
    places.instance("i-2").exit_file.write_text('{"exit_code": 4}')
    assert node.adoption.exit_code("i-2") == 4


async def test_one_that_is_gone_is_not(node: Node, answer: asyncio.Future[dict[str, Any]]) -> None:
    answer.set_exception(KeeperLost("no such file"))
    assert not await node.adopt()
    assert node.roster.instances == {}


@pytest.mark.parametrize("state", ["ready", "starting", "stopping"])
async def test_one_that_does_not_answer_yet_is_kept(
    node: Node, answer: asyncio.Future[dict[str, Any]], state: str
) -> None:
    assert await node.adopt(state)
    kept = node.roster.instances["i-1"]
    assert kept.state == ("ready" if state == "ready" else "starting")
    assert node.heard == []
    answer.set_result(TOLD)
    await asyncio.sleep(0.05)
    assert kept.state == "ready"
    assert node.heard == ["i-1"]
    assert node.ended == []


@pytest.mark.parametrize(
    ("state", "told", "end"),
    [
        ("ready", KeeperLost("it is gone"), "failed"),
        ("ready", TOLD | {"phase": "exited"}, "failed"),
        ("ready", TOLD | {"phase": "exited", "exit_code": 0}, "exited"),
        ("prepared", TOLD | {"phase": "prepared"}, "forgotten"),
    ],
)
async def test_one_that_turns_out_to_be_over(
    node: Node, answer: asyncio.Future[dict[str, Any]], state: str, told: Any, end: str
) -> None:
    assert await node.adopt(state)
    if isinstance(told, Exception):
        answer.set_exception(told)
    else:
        answer.set_result(told)
    await asyncio.sleep(0.05)
    assert node.ended == [end]
    assert node.heard == []


async def test_one_that_is_stopped_meanwhile(node: Node, answer: asyncio.Future[dict[str, Any]]) -> None:
    assert await node.adopt()
    node.roster.instances["i-1"].state = "stopping"
    answer.set_result(TOLD)
    await asyncio.sleep(0.05)
    assert node.heard == node.ended == []


async def test_what_cannot_be_seen_is_asked_again(
    node: Node, answer: asyncio.Future[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket whose queue is full, a node without descriptors: neither says that the keeper is gone."""
    tries: list[Callable[[], Any]] = []

    async def connect(self: SlowKeeper, *, patience: float) -> dict[str, Any]:
        tries.append(connect)
        if len(tries) < 3:
            raise BlockingIOError("its queue is full")
        return TOLD

    monkeypatch.setattr(SlowKeeper, "connect", connect)
    assert await node.adopt()
    await asyncio.sleep(0.05)
    assert node.heard == ["i-1"]


async def test_one_whose_memory_failed_it_meanwhile_is_replaced(
    node: Node, answer: asyncio.Future[dict[str, Any]]
) -> None:
    replaced: list[Instance] = []

    async def replace(instance: Instance) -> None:
        await instance.ended.wait()
        replaced.append(instance)

    node.adoption._failures = cast("Any", SimpleNamespace(replace=replace))
    failed = {"event": "failed", "reason": "the pager was killed", "untrusted": False}
    answer.set_result(TOLD | {"phase": "exited", "exit_code": 137, "paging": failed})
    assert not await node.adopt()
    assert not replaced, "the node is not open yet"
    node.adoption.replace_failed()
    await asyncio.sleep(0.01)
    (instance,) = replaced
    assert (instance.paging_failed, instance.environment) == ("the pager was killed", {"TOKEN": "t"})


async def test_a_pager_that_failed_just_before_is_heard_of(
    node: Node, answer: asyncio.Future[dict[str, Any]]
) -> None:
    """The end of its app is still to come: without the reason it would pass for one that ended by itself."""
    failed = {"event": "failed", "reason": "the pager was killed", "untrusted": False}
    answer.set_result(TOLD | {"paging": failed})
    assert await node.adopt()
    assert node.events == [{"event": "pager", "told": failed}]
