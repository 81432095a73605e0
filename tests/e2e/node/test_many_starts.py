"""Fifty starts from one checkpoint, and many rounds: as quick at the end as at the beginning, nothing grows."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

import leftovers
from harness import SNIPPET, App, Relume, get
from relume.linux import mounts

STARTS = 50
EDGE = 5
SLOWER = 1.2
"""What the last starts may take, as a multiple of the first ones."""

ROUNDS = 20


@pytest.fixture
def restorable(relume: Relume, app: App) -> App:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    relume.start(app.name)
    relume.stop(app.name)
    for _ in range(2):  # what only the first restore of a checkpoint does, and the first with a working set
        assert relume.start(app.name)["restored"]
        relume.stop(app.name)
    return app


@pytest.mark.timeout(900)
def test_fifty_starts_side_by_side(relume: Relume, restorable: App) -> None:
    node = leftovers.node_id(relume)
    for attempt in range(4):
        copies = [relume.start(restorable.name) for _ in range(STARTS)]
        assert all(copy["restored"] for copy in copies), [copy["reason"] for copy in copies]
        assert [get(copy, "/count")["hits"] for copy in copies] == [1] * STARTS
        assert len({copy["url"] for copy in copies}) == STARTS
        # The soonest of each: what else the machine does only ever adds to it.
        first, last = (min(copy["ready_s"] for copy in part) for part in (copies[:EDGE], copies[-EDGE:]))
        print(f"first {first:.3f} s, last {last:.3f} s")
        relume.run("stop", restorable.name)
        for copy in copies:
            leftovers.soon_nothing(leftovers.of_instance, node, copy["instance_id"])
        if last <= SLOWER * first:
            return
        assert attempt < 3, f"the first {EDGE} took {first:.3f} s, the last {EDGE} {last:.3f} s"


def test_nothing_grows_over_many_rounds(relume: Relume, restorable: App) -> None:
    assert relume.process is not None
    node = relume.process.pid

    def one_round() -> None:
        relume.start(restorable.name)
        relume.run("stop", restorable.name)

    for _ in range(3):
        one_round()
    gc.collect()
    own = leftovers.RUN / leftovers.node_id(relume)
    before, memory, mounted = _descriptors(node), _resident(node), len(mounts.under(own))
    for _ in range(ROUNDS):
        one_round()
    grown = sorted(set(_descriptors(node)) - set(before))
    assert len(_descriptors(node)) <= len(before) + 2, grown
    assert _resident(node) <= memory + (8 << 20)
    assert len(mounts.under(own)) <= mounted
    assert len(list(Path(f"/proc/{node}/task").iterdir())) < 40


def _descriptors(pid: int) -> list[str]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(f"{path.name} {path.readlink()}")
        except OSError:
            continue
    return found


def _resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
