"""A full disk: what cannot be written down keeps nothing from its end, which is what may free the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.errors import HostError
from relume.node import roster as roster_module
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


@pytest.fixture
async def writing(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """What could not be written is tried again, quickly."""
    monkeypatch.setattr(roster_module, "_AGAIN", 0.01)
    task = asyncio.create_task(roster.write_later())
    yield
    task.cancel()


@pytest.mark.usefixtures("writing")
async def test_it_is_written_when_there_is_room(roster: Roster, state: State, instance: MakeInstance) -> None:
    """One that serves and is in no row would be ended by the next run of the node."""
    saved = instance()
    roster.instances["i-1"] = saved
    state._execute("pragma query_only = 1")
    roster.save(saved)
    await asyncio.sleep(0.05)
    assert state.instances() == []
    state._execute("pragma query_only = 0")
    await asyncio.sleep(0.05)
    assert [(row["instance_id"], row["state"]) for row in state.instances()] == [("i-1", "ready")]


@pytest.mark.usefixtures("writing")
async def test_the_end_of_one_that_was_in_no_row(
    roster: Roster, state: State, instance: MakeInstance
) -> None:
    state.ensure_app("a")
    ended = instance(exit_code=3)
    roster.instances["i-1"] = ended
    state._execute("pragma query_only = 1")
    roster.save(ended)
    ended.state = "exited"
    roster.remove(ended)
    state._execute("pragma query_only = 0")
    await asyncio.sleep(0.05)
    (row,) = state.instances()
    assert (row["state"], row["facts"]["exit_code"]) == ("exited", 3)
    assert row["ended_at"] is not None


@pytest.mark.usefixtures("writing")
async def test_the_end_of_one_whose_app_was_removed(
    roster: Roster, state: State, instance: MakeInstance
) -> None:
    state.ensure_app("a")
    ended = instance()
    roster.instances["i-1"] = ended
    state._execute("pragma query_only = 1")
    roster.save(ended)
    roster.remove(ended)
    state._execute("pragma query_only = 0")
    state.remove_app("a")
    await asyncio.sleep(0.05)
    assert state.instances() == []


async def test_the_next_run_opens_all_the_same(roster: Roster, state: State) -> None:
    """What is dead may be what fills the disk, and is cleared away after this."""
    save(state, "i-1", "")
    (row,) = state.instances()
    state._execute("pragma query_only = 1")
    roster.ended_before(row, None)
    roster.ended_before(row | {"state": "prepared"}, None)
    (row,) = state.instances()
    assert row["ended_at"] is None


def test_a_state_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "node.db").mkdir()
    with pytest.raises(HostError, match="cannot be read or written"):
        State(tmp_path)
    (tmp_path / "node.db").rmdir()
    State(tmp_path).close()  # and nobody holds its lock
