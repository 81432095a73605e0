"""Steps of replay and fill, and the room that a fill asks for."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path

import pytest

from pager.miniature import BASE, PAGE, PAGES, Refused, kernel, restored
from relume.linux import cgroup
from relume.pager import background, room
from relume.pager.ranges import Range


def test_a_step_is_no_larger_than_asked() -> None:
    rest = deque([Range(0, 100, 0), Range(200, 500, 200), Range(600, 700, 600)])
    assert background._step(rest, 250) == [Range(0, 100, 0), Range(200, 350, 200)]
    assert background._step(rest, 1000) == [Range(350, 500, 350), Range(600, 700, 600)]
    assert not rest


def test_a_fill_waits_for_copies_that_may_yet_be_refused() -> None:
    """It finds nothing to come while another thread copies it all; that copy is refused, and nobody else is left."""
    with kernel() as made:
        space, changed, failed = restored(made), threading.Event(), []
        replay = Refused(made, space, Range(BASE * PAGE, (BASE + PAGES) * PAGE, 0))
        replay.begin()
        assert not space.pending.total
        fill = background.Fill(None, background.Pace(), changed.set, failed.append)
        fill.start(lambda: [space])
        time.sleep(0.05)
        assert not space.complete
        replay.end()
        deadline = time.monotonic() + 5
        while not space.complete:
            assert not failed
            assert time.monotonic() < deadline, "the fill fell asleep"
            time.sleep(0.01)
        assert len(made.memories[3].present) == PAGES
        space.dead = True


def test_a_fill_looks_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_FILL_LOOK_SECONDS", 0.02)
    with kernel() as made:
        space, asleep = restored(made), threading.Event()
        kept = space.pending.take(0, (BASE + PAGES) * PAGE)
        fill = background.Fill(None, background.Pace(), asleep.set, lambda error: None)
        fill.start(lambda: [space])
        assert asleep.wait(5)
        time.sleep(0.01)
        with space._lock:
            for each in kept:
                space.pending.put(each)
        deadline = time.monotonic() + 5
        while not space.complete:
            assert time.monotonic() < deadline, "the fill fell asleep"
            time.sleep(0.01)
        space.dead = True


def test_a_step_of_the_fill_has_few_ranges() -> None:
    """A fault waits for it; of single pages a step of 2 MiB would have 512."""
    with kernel() as made:
        space = restored(made, range(0))
        for page in range(400):
            space.pending.put(Range(2 * page * PAGE, (2 * page + 1) * PAGE, page * PAGE))
        fill = background.Fill(None, background.Pace(), lambda: None, lambda error: None)
        steps = list(fill._steps(space))
        assert [part for step in steps for part in step] == list(space.pending)
        assert max(map(len, steps)) <= 64


def test_a_replay_is_over_once() -> None:
    """CRIU names another process when all that was learned is in."""
    over = threading.Semaphore(0)
    replay = background.Replay([], set(), 2, background.Pace(), lambda _: over.release(), lambda error: None)
    replay.start(lambda _: None)
    assert over.acquire(timeout=60)
    replay.start(lambda _: None)
    assert not over.acquire(timeout=0.1)


def test_steps_are_small_while_faults_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FAULT_SECONDS", 60.0)
    pace = background.Pace()
    assert pace.step == background.STEP_BYTES
    pace.fault()
    assert pace.step == background.SMALL_STEP_BYTES


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    names = {
        1: ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
        2: ("memory.current", "memory.max", "inactive_file"),
    }
    used, limit, reclaimable = names[version]
    mib = 1 << 20
    for name, in_use, bound, droppable in (("a", 900, "1000", 100), ("a/b", 10, "max", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / used).write_text(str(in_use * mib))
        (folder / limit).write_text(bound if bound == "max" else str(int(bound) * mib))
        (folder / "memory.stat").write_text(f"anon 5\n{reclaimable} {droppable * mib}\n")
    monkeypatch.setattr(cgroup, "hierarchies", lambda: (tmp_path,))
    assert room.available("/a/b") == (1000 - 900 + 100) * mib - room.MARGIN_BYTES
    (tmp_path / "a" / limit).write_text(str(1 << 62) if version == 1 else "max")
    assert room.available("/a/b") == pytest.approx(room.available(None), rel=0.2)
    # The node itself in a container: the hierarchy's root is that container's group.
    for file, text in ((used, 900 * mib), (limit, 1000 * mib), ("memory.stat", f"{reclaimable} 0")):
        (tmp_path / file).write_text(f"{text}\n")
    assert room.available("/a/b") == 100 * mib - room.MARGIN_BYTES
    if version == 2:
        (tmp_path / "memory.high").write_text(f"{980 * mib}\n")
        assert room.available("/a/b") == 80 * mib - room.MARGIN_BYTES
