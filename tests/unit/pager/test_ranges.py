"""RangeMap against a dictionary with one entry per page: every operation, any order."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from relume.pager.ranges import Range, RangeMap

PAGE = 4096
PAGES = 48
"""A small space, so that operations meet each other."""

pages = st.integers(0, PAGES - 1)
counts = st.integers(1, PAGES // 2)


class PerPage(RuleBasedStateMachine):
    """The model: page number -> page number in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.map = RangeMap()
        self.model: dict[int, int] = {}
        self.next_source = 0

    @initialize(present=st.lists(st.booleans(), min_size=PAGES, max_size=PAGES))
    def fill(self, present: list[bool]) -> None:
        for page, there in enumerate(present):
            if there:
                self._put(page, page)
        self.next_source = PAGES

    @rule(page=pages, count=counts)
    def take(self, page: int, count: int) -> None:
        taken = self.map.take(page * PAGE, (page + count) * PAGE)
        assert _by_page(taken) == {
            number: self.model.pop(number) for number in range(page, page + count) if number in self.model
        }

    @rule(page=pages)
    def put(self, page: int) -> None:
        if page in self.model:
            with pytest.raises(ValueError, match="taken"):
                self.map.put(Range(page * PAGE, (page + 1) * PAGE, 0))
        else:
            self._put(page, self.next_source)
            self.next_source += 1

    @rule(source=pages, destination=pages, count=counts)
    def move(self, source: int, destination: int, count: int) -> None:
        if abs(source - destination) < count:
            return  # mremap(2) refuses an overlap with EINVAL
        self.map.move(source * PAGE, destination * PAGE, count * PAGE)
        moving = {
            number: self.model.pop(number) for number in range(source, source + count) if number in self.model
        }
        for number in range(destination, destination + count):
            self.model.pop(number, None)
        self.model |= {number + destination - source: origin for number, origin in moving.items()}

    @rule()
    def fork(self) -> None:
        parent, self.map = self.map, self.map.copy()
        parent.take(0, 2 * PAGES * PAGE)

    @rule(page=pages)
    def look(self, page: int) -> None:
        address = page * PAGE
        found = self.map.at(address)
        assert (found is None) == (page not in self.model)
        following = self.map.after(address)
        rest = [number for number in self.model if number >= page]
        if not rest:
            assert following is None
        else:
            assert following is not None
            assert following.start == min(rest) * PAGE
            assert following.offset == self.model[min(rest)] * PAGE
        if found is None:
            low, high = self.map.gap(address, 0, 2 * PAGES * PAGE)
            assert not any(low <= number * PAGE < high for number in self.model)
            assert low == 0 or low // PAGE - 1 in self.model
            assert high == 2 * PAGES * PAGE or high // PAGE in self.model

    @rule(page=pages, count=counts)
    def overlap(self, page: int, count: int) -> None:
        found = self.map.overlap(page * PAGE, (page + count) * PAGE)
        assert _by_page(found) == {n: o for n, o in self.model.items() if page <= n < page + count}
        gaps = self.map.gaps(page * PAGE, (page + count) * PAGE)
        free = [n for low, high in gaps for n in range(low // PAGE, high // PAGE)]
        assert free == [n for n in range(page, page + count) if n not in self.model]
        assert all(low < high for low, high in gaps)

    @invariant()
    def same(self) -> None:
        ranges = list(self.map)
        assert _by_page(ranges) == self.model
        assert self.map.total == len(self.model) * PAGE
        for one, other in itertools.pairwise(ranges):
            assert one.end <= other.start
            assert not (one.end == other.start and one.offset + one.length == other.offset), "not merged"

    def _put(self, page: int, source: int) -> None:
        self.map.put(Range(page * PAGE, (page + 1) * PAGE, source * PAGE))
        self.model[page] = source


def _by_page(ranges: list[Range]) -> dict[int, int]:
    return {
        (start + step) // PAGE: (offset + step) // PAGE
        for start, end, offset in ranges
        for step in range(0, end - start, PAGE)
    }


TestPerPage = PerPage.TestCase
TestPerPage.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        RangeMap([Range(PAGE, PAGE, 0)])
