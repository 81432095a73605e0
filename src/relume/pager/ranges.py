"""Which pages of an address space are still to come, and from where in the pages file.

Pure arithmetic over byte addresses, no system call: the property tests hold it against a model with one
entry per page. A range is half open and carries the offset of its first byte in the source; the offset of
its other bytes follows from that, through splits and moves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Range(NamedTuple):
    """Bytes [start, end) of the address space, to be had at ``offset`` in the source."""

    start: int
    end: int
    offset: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def cut(self, start: int, end: int) -> Range:
        """The part of this range within [start, end), which must overlap it."""
        low, high = max(self.start, start), min(self.end, end)
        return Range(low, high, self.offset + low - self.start)


class RangeMap:
    """Disjoint ranges in address order. Neighbours that continue each other in the source are one.

    Not safe for use from several threads; the owner locks.
    """

    __slots__ = ("_offsets", "_starts", "_stops", "total")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._offsets: list[int] = []
        self.total = 0
        """Bytes in all ranges together."""
        for each in ranges:
            if each.start < each.end and (not self._stops or self._stops[-1] <= each.start):
                self._append(each)  # the usual case: they come in order
            else:
                self.put(each)

    def __iter__(self) -> Iterator[Range]:
        return map(Range, self._starts, self._stops, self._offsets)

    def __len__(self) -> int:
        return len(self._starts)

    def copy(self) -> RangeMap:
        """An independent map with the same ranges: what a forked child still lacks."""
        twin = RangeMap()
        twin._starts, twin._stops, twin._offsets = self._starts[:], self._stops[:], self._offsets[:]
        twin.total = self.total
        return twin

    def at(self, address: int) -> Range | None:
        """The range that holds ``address``."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self._stops[index]:
            return self._range(index)
        return None

    def after(self, address: int) -> Range | None:
        """The first range that ends after ``address``, cut to begin no earlier than it."""
        index = bisect_right(self._stops, address)
        if index == len(self._starts):
            return None
        found = self._range(index)
        return found.cut(address, found.end) if found.start < address else found

    def overlap(self, start: int, end: int) -> list[Range]:
        """The parts of the ranges that lie within [start, end)."""
        first, last = self._span(start, end)
        return [self._range(index).cut(start, end) for index in range(first, last)]

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts [a, b) of [start, end) that no range touches: what :meth:`overlap` leaves."""
        found = []
        for taken in self.overlap(start, end):
            if start < taken.start:
                found.append((start, taken.start))
            start = taken.end
        if start < end:
            found.append((start, end))
        return found

    def gap(self, address: int, low: int, high: int) -> tuple[int, int]:
        """The largest [a, b) around ``address`` within [low, high) that no range touches.

        ``address`` must lie in no range.
        """
        index = bisect_right(self._starts, address)
        below = self._stops[index - 1] if index else low
        above = self._starts[index] if index < len(self._starts) else high
        return max(low, below), min(high, above)

    def put(self, new: Range) -> None:
        """Adds a range. Raises ValueError where one is already there, or ``new`` is empty."""
        start, end, offset = new
        first, last = self._span(start, end)
        if first != last or start >= end:
            raise ValueError(f"{start:#x}-{end:#x} is taken or empty")
        self.total += end - start
        if first and self._stops[first - 1] == start and self._continues(first - 1, start, offset):
            first -= 1
            start, offset = self._starts[first], self._offsets[first]
        if (
            last < len(self._starts)
            and self._starts[last] == end
            and self._offsets[last] == offset + end - start
        ):
            end = self._stops[last]
            last += 1
        self._starts[first:last] = [start]
        self._stops[first:last] = [end]
        self._offsets[first:last] = [offset]

    def take(self, start: int, end: int) -> list[Range]:
        """Removes what lies within [start, end) and returns it."""
        first, last = self._span(start, end)
        if first == last:
            return []
        affected = [self._range(index) for index in range(first, last)]
        kept = [each.cut(low, high) for each in affected for low, high in _outside(each, start, end)]
        taken = [each.cut(start, end) for each in affected]
        self._starts[first:last] = [each.start for each in kept]
        self._stops[first:last] = [each.end for each in kept]
        self._offsets[first:last] = [each.offset for each in kept]
        self.total -= sum(each.length for each in taken)
        return taken

    def move(self, source: int, destination: int, length: int) -> None:
        """Moves what lies at ``source`` to ``destination``; what the map had there is gone."""
        moving = self.take(source, source + length)
        self.take(destination, destination + length)
        shift = destination - source
        for start, end, offset in moving:
            self.put(Range(start + shift, end + shift, offset))

    def _append(self, new: Range) -> None:
        start, end, offset = new
        self.total += end - start
        if self._stops and self._stops[-1] == start and self._continues(-1, start, offset):
            self._stops[-1] = end
        else:
            self._starts.append(start)
            self._stops.append(end)
            self._offsets.append(offset)

    def _range(self, index: int) -> Range:
        return Range(self._starts[index], self._stops[index], self._offsets[index])

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """The slice of ranges that overlap [start, end)."""
        first = bisect_right(self._stops, start)
        return first, max(first, bisect_left(self._starts, end))

    def _continues(self, index: int, address: int, offset: int) -> bool:
        return self._offsets[index] + address - self._starts[index] == offset


def _outside(each: Range, start: int, end: int) -> Iterator[tuple[int, int]]:
    if each.start < start:
        yield each.start, start
    if end < each.end:
        yield end, each.end
