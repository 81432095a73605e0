"""A full disk: what cannot be written down keeps nothing from its end, which is what may free the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.errors import HostError
from relume.node.background import Background
from relume.node.ending import Ending
from relume.node.hearing import Hearing
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.roster import Roster
from relume.node.state import State

MakeInstance = Callable[..., Instance]


def fill(state: State) -> None:
    """No page more for the database, and nothing free in the pages that it has."""
    pages = state._execute("pragma page_count")[0][0]
    state._execute(f"pragma max_page_count = {pages}")
    for size in (3000, 300, 30, 0):
        with pytest.raises(HostError):
            for number in range(10_000):
                save(state, f"filling-{size}-{number}", "x" * size)


def save(state: State, instance_id: str, content: str) -> None:
    state.save_instance(
        instance_id, app="other", build_id="b", state="ready", started_at=1.0, facts={"content": content}
    )


@pytest.fixture
def state(places: Places) -> Iterator[State]:
    state = State(places.state)
    yield state
    state.close()


@pytest.fixture
def roster(places: Places, state: State) -> Roster:
    return Roster(places, state)


@pytest.fixture
def ending(roster: Roster) -> Ending:
    ground = SimpleNamespace(clear=lambda *_, **__: None)
    gpus = SimpleNamespace(take_back=lambda _: None)
    return Ending(roster, cast("Any", ground), cast("Any", gpus), finish_copy=lambda _: None)


def test_it_is_said(state: State) -> None:
    fill(state)
    with pytest.raises(HostError, match="full") as said:
        save(state, "i-1", "x" * 100)
    assert "disk" in said.value.hint
    assert state.instances(), "and what is there can be read"


async def test_it_can_be_stopped(
    roster: Roster, state: State, ending: Ending, instance: MakeInstance
) -> None:
    stopped = instance()
    roster.instances["i-1"] = stopped
    roster.save(stopped)
    fill(state)
    state._execute("pragma query_only = 1")  # some updates in place would still be possible
    async with asyncio.timeout(5):
        await ending.stop(stopped)
        await ending.discard(stopped, "failed")  # whoever comes second
    assert stopped.gone.is_set()
    assert roster.instances == {}
    (row,) = (row for row in state.instances() if row["instance_id"] == "i-1")
    assert row["ended_at"] is None, "not written, and the next run of the node sees what became of it"


async def test_it_becomes_ready(roster: Roster, state: State, ending: Ending, instance: MakeInstance) -> None:
    coming = instance(state="starting")
    fill(state)
    nobody = cast("Any", None)
    hearing = Hearing(roster, ending, nobody, nobody, Background(), None, finish_copy=lambda _: None)
    hearing.heard(coming, {"event": "ready", "at": 1.0, "timeline": {}})
    assert coming.ready.is_set()
    assert coming.state == "ready"
    assert state.instances(), "the state is still there"


async def test_the_next_writing_mends_it(roster: Roster, state: State, instance: MakeInstance) -> None:
    saved = instance()
    roster.instances["i-1"] = saved
    state._execute("pragma query_only = 1")
    roster.save(saved)
    assert state.instances() == []
    state._execute("pragma query_only = 0")
    roster.save(saved)
    assert [row["instance_id"] for row in state.instances()] == ["i-1"]
