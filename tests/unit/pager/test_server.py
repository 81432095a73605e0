"""The loop itself: what it leaves to threads that may wait, what it learns and when, what it lets go of."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pager.miniature import BASE, PAGE, PAGES, Partly, kernel, restored
from relume.errors import PagerError
from relume.images.pagemap import Pagemap
from relume.linux.userfaultfd import Fork, Remap, Unmap
from relume.pager import working_set
from relume.pager.holder import Board
from relume.pager.job import Job
from relume.pager.server import Pager
from relume.pager.space import Counters
from relume.pager.working_set import Piece, Run, WorkingSet


def pager(folder: Path, **options: Any) -> tuple[Pager, list[dict[str, Any]]]:
    """One whose CRIU is done, with pages-1.img; and the events that it sends."""
    events: list[dict[str, Any]] = []
    job = Job(folder, folder, fill="demand", **options)
    made = Pager(job, Board(), events.append, None)
    made._pagemaps = {7: Pagemap(7, folder / "pages-1.img", (), PAGES * PAGE)}
    made._prepare_replay()
    made._met_criu = True
    made._restored_at = time.monotonic() - 1
    return made, events


def test_the_loop_waits_for_no_disk(tmp_path: Path) -> None:
    """One page of many is at hand, and something is doubtful: what is not goes to threads that may wait."""
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        space.source = source = Partly({5})
        above = BASE + PAGES
        memory.mapped |= set(range(above, above + 4))
        memory.events += [
            Remap((BASE + 30) * PAGE, above * PAGE, 4 * PAGE),
            Unmap(above * PAGE, (above + 4) * PAGE),
        ]
        memory.changing = True
        space.read()
        assert space.doubtful
        served, _ = pager(tmp_path)
        space.waiting = {(BASE + page) * PAGE for page in (5, 6)}
        threading.Thread(target=served._serve_slow, name="may wait", daemon=True).start()
        served._serve(space)
        deadline = time.monotonic() + 10
        while space.asked:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert not space.waiting
        assert not space.doubtful
        here = threading.current_thread().name
        assert {pages for name, pages in source.loaded if name == here} == {range(5, 6)}
        assert {name for name, _ in source.loaded} == {here, "may wait"}
        assert {BASE + 5, BASE + 6} <= memory.present.keys()


def test_the_loop_asks_after_a_move_until_all_is_quiet(tmp_path: Path) -> None:
    """Nothing else may tell: the app moves something, and unmaps it when the pager has long been asleep."""
    with kernel() as made:
        space, memory, above = restored(made), made.memories[3], BASE + PAGES
        memory.delay = 2
        memory.mapped = set(range(above, above + PAGES))
        served, _ = pager(tmp_path)
        memory.events.append(Remap(BASE * PAGE, above * PAGE, PAGES * PAGE))
        memory.changing = True
        served._readable(space)
        rounds = 0
        while space in served._hungry:
            served._serve(space)
            rounds += 1
        assert rounds == 3
        memory.mapped = set()
        memory.events.append(Unmap(above * PAGE, (above + PAGES) * PAGE))
        memory.changing = True
        served._readable(space)
        assert space.complete


def test_the_loop_asks_what_is_doubtful_in_a_child(tmp_path: Path) -> None:
    with kernel() as made:
        space, memory, above = restored(made), made.memories[3], BASE + PAGES
        reading, writing = os.pipe()
        memory.mapped = set()
        made.memories[reading] = memory.fork()
        memory.events += [
            Remap(BASE * PAGE, above * PAGE, PAGES * PAGE),
            Unmap(above * PAGE, (above + PAGES) * PAGE),
            Fork(reading),
        ]
        memory.changing = True
        served, _ = pager(tmp_path)
        served._readable(space)
        for _ in range(3):
            for each in list(served._hungry):
                served._serve(each)
        (child,) = served._spaces
        assert space.complete and child.complete
        assert not served._hungry
        child.close()
        os.close(writing)


def test_a_fault_that_is_given_back_at_once_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that may wait can be through with it before the loop goes on."""
    with kernel() as made:
        space = restored(made)
        space.source = Partly(set())
        served, _ = pager(tmp_path)
        address = (BASE + 5) * PAGE

        def given_back(request: tuple[Any, int]) -> None:
            space.waiting.add(request[1])
            space.asked.discard(request[1])

        monkeypatch.setattr(served, "_slow", SimpleNamespace(put=given_back))
        space.waiting = {address}
        served._serve(space)
        assert space.waiting == {address}


def learned(folder: Path) -> tuple[Path, WorkingSet]:
    """One with many blocks' worth of history and a turn, in a file."""
    path = folder / "set"
    known = WorkingSet(
        {1: PAGES * PAGE}, tuple(Piece(1, page * PAGE, PAGE) for page in range(8)), 9, (Run(True, 0.5, 0),)
    )
    working_set.save(path, known)
    return path, known


def test_a_start_that_nobody_asks_teaches_nothing(tmp_path: Path) -> None:
    """It has touched little, and 60 s are no time to an answer: what is known is better."""
    path, known = learned(tmp_path)
    served, events = pager(tmp_path, working_set=path, record=path, record_limit_s=0.01)
    served._copied(1, 20 * PAGE, PAGE)
    served._probe()
    served._copied(1, 21 * PAGE, PAGE)
    served._first_answer()
    assert working_set.load(path, known.images) == (known, "")
    assert [event["event"] for event in events] == ["unanswered", "answered"]


def test_what_an_idle_app_touched_is_better_than_nothing(tmp_path: Path) -> None:
    path = tmp_path / "set"
    served, events = pager(tmp_path, working_set=path, record=path, record_limit_s=0.01)
    served._copied(1, 20 * PAGE, PAGE)
    served._probe()
    served._finish_record()
    found, _ = working_set.load(path, {1: PAGES * PAGE})
    assert found is not None
    assert (found.pieces, found.history) == ((Piece(1, 20 * PAGE, PAGE),), ())
    assert [event["event"] for event in events] == ["unanswered", "recorded"]


def test_an_answer_is_learned_from(tmp_path: Path) -> None:
    path, known = learned(tmp_path)
    served, events = pager(tmp_path, working_set=path, record=path)
    served._copied(1, 20 * PAGE, PAGE)
    served._probe()
    served._first_answer()
    served._finish_record()
    found, _ = working_set.load(path, known.images)
    assert found is not None
    assert (found.turn, len(found.history)) == (known.turn + 1, 2)
    assert Piece(1, 20 * PAGE, PAGE) in found.pieces
    assert [event["event"] for event in events] == ["answered", "recorded"]


def test_the_loop_goes_on_while_the_set_is_written_but_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, save = threading.Event(), working_set.save

    def slow(path: Path, learned: WorkingSet) -> None:
        written.wait(2)
        save(path, learned)

    monkeypatch.setattr(working_set, "save", slow)
    path, _ = learned(tmp_path)
    served, events = pager(tmp_path, working_set=path, record=path)
    served._first_answer()
    assert [event["event"] for event in events] == ["answered"]
    threading.Timer(0.05, written.set).start()
    served._end()
    assert [event["event"] for event in events] == ["answered", "recorded", "filled"]


@pytest.mark.parametrize("unread", [False, True])
def test_the_memory_is_served_without_a_keeper(tmp_path: Path, unread: bool) -> None:
    """Killed with an event of ours unread, its end is a reset connection: still no fault of ours."""
    served, _ = pager(tmp_path)
    keepers, ours = socket.socketpair()
    served._control = ours
    served._watch(ours, served._command)
    if unread:
        ours.send(b"{}\n")
    keepers.close()
    served._command()
    assert served._control is None
    ours.close()


def test_it_does_not_wait_for_a_criu_that_nobody_starts(tmp_path: Path) -> None:
    """The keeper was killed before it came to that."""
    served = Pager(Job(tmp_path, tmp_path), Board(), lambda event: None, None)
    keepers, ours = socket.socketpair()
    served._control = ours
    served._watch(ours, served._command)
    keepers.close()
    with pytest.raises(PagerError):
        served._command()
    ours.close()


def test_of_processes_that_ended_only_sums_are_kept(tmp_path: Path) -> None:
    """A server that forks for each request, in demand mode, for months."""
    with kernel() as made:
        served, events = pager(tmp_path)
        for number in range(1, 4):
            space = restored(made, range(0))
            reading, space.descriptor = os.pipe()
            os.close(reading)
            made.memories[space.descriptor] = made.memories[3]
            space.counters = Counters(faults=number, zero_faults=1)
            served._watch_space(space)
        served._close_complete()
        served._end()
    assert dataclasses.asdict(served._totals) | {"faults": 6, "zero_faults": 3} == dataclasses.asdict(
        served._totals
    )
    assert events[-1] | {"event": "filled", "processes": 3, "faults": 6, "zero_faults": 3} == events[-1]
