"""All memory of a process at once: the pieces, their order, and what moves or keeps changing meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pager.miniature import BASE, PAGES, Refused, kernel, restored
from relume.pager.background import STEP_BYTES, Pace
from relume.pager.ranges import Range, RangeMap
from relume.pager.source import NoPages
from relume.pager.space import Served
from relume.pager.whole import Whole, _parts

PAGE = 4096
EXTENTS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 1500)), max_size=8)


def extents(drawn: list[tuple[int, int]]) -> list[Range]:
    """Pages of a file in a row, with gaps between their addresses."""
    address = offset = 0
    found = []
    for gap, pages in drawn:
        address += gap * PAGE
        found.append(Range(address, address + pages * PAGE, offset))
        address, offset = found[-1].end, offset + pages * PAGE
    return found


@given(EXTENTS)
def test_parts_are_the_ranges_cut_at_the_blocks_of_the_file(drawn: list[tuple[int, int]]) -> None:
    ranges = extents(drawn)
    parts = _parts(ranges)
    assert list(RangeMap(parts)) == list(RangeMap(ranges))
    assert [part.offset for part in parts] == sorted(part.offset for part in parts)
    for part in parts:
        assert part.offset // STEP_BYTES == (part.offset + part.length - 1) // STEP_BYTES


class Source(NoPages):
    def load(self, offset: int, length: int) -> int:
        return 0


class Space:
    """As much of an AddressSpace as is used: ``busy`` times it says LATER, and one range has moved away."""

    def __init__(self, ranges: list[Range], busy: int, moved: Range | None) -> None:
        self.pending = RangeMap(ranges)
        if moved is not None:
            self.pending.move(moved.start, 1 << 40, moved.length)
        self.busy = busy
        self.restored = True
        self.dead = False
        self.asked: list[Range] = []
        self._lock = threading.Lock()

    def bring(self, wanted: Sequence[Range]) -> tuple[Served, int]:
        with self._lock:
            self.asked += wanted
            if self.busy:
                self.busy -= 1
                return Served.LATER, 0
            taken = [found for each in wanted for found in self.pending.take(each.start, each.end)]
            return Served.DONE, sum(found.length for found in taken)

    @property
    def lacking(self) -> bool:
        with self._lock:
            return bool(self.pending.total)

    def next_pending(self, address: int) -> Range | None:
        with self._lock:
            return self.pending.after(address)


@given(EXTENTS.filter(bool), st.integers(0, 5), st.booleans(), st.integers(1, 3))
def test_everything_comes(drawn: list[tuple[int, int]], busy: int, moves: bool, threads: int) -> None:
    ranges = extents(drawn)
    space = Space(ranges, busy, ranges[0] if moves else None)
    failed: list[BaseException] = []
    done = threading.Semaphore(0)
    whole = Whole({7: (Source(), ranges)}, threads, Pace(), done.release, failed.append)
    whole.start(7, space)  # type: ignore[arg-type]
    for _ in range(threads):
        assert done.acquire(timeout=20)
    assert not failed and not space.pending.total
    assert whole.copied == sum(each.length for each in ranges)


def test_it_waits_for_copies_that_may_yet_be_refused() -> None:
    """It finds nothing to come while another thread copies the last of it; that copy is refused, and nobody is left."""
    with kernel() as made:
        space, failed = restored(made), []
        other = Refused(made, space, Range(BASE * PAGE, (BASE + PAGES) * PAGE, 0))
        other.begin()
        done = threading.Semaphore(0)
        whole = Whole({7: (Source(), [])}, 1, Pace(), done.release, failed.append)
        whole.start(7, space)
        assert not done.acquire(timeout=0.05)
        other.end()
        assert done.acquire(timeout=60)
        assert not failed
        assert len(made.memories[3].present) == PAGES


def test_a_process_that_ended_is_let_go() -> None:
    ranges = extents([(0, 10)])
    space = Space(ranges, 0, None)
    space.dead = True
    done = threading.Semaphore(0)
    whole = Whole({7: (Source(), ranges)}, 1, Pace(), done.release, lambda error: None)
    whole.start(7, space)  # type: ignore[arg-type]
    assert done.acquire(timeout=20) and not space.asked
