"""The index: which chunk holds which page of which stream. Plain values and their encoding (docs/format.md).

Reading checks everything that later code relies on: that runs and chunks describe the same number of pages,
that names are plain file names, that nothing is left over. A bad index raises Untrusted.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from relume.errors import BadRequest, Untrusted
from relume.store.chunks import MAX_PAGES, PAGE
from relume.store.names import word

_COUNT = struct.Struct("<I")
_NAME = struct.Struct("<H")
_SIZE = struct.Struct("<Q")
_RUN = struct.Struct("<II")
_CHUNK = struct.Struct("<32sII")
_MAX_SIZE = 1 << 44  # 16 TiB: past any memory, and far from overflow


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk as an index names it: its pages, and the size of its object in bytes."""

    id: bytes
    pages: int
    stored: int


@dataclass(frozen=True, slots=True)
class Extent:
    """`pages` pages of a chunk, from its page `within` on, lie at page `page` of the stream."""

    page: int
    within: int
    pages: int


@dataclass(frozen=True)
class Stream:
    """One stream: `runs` are (zero pages, data pages) in order; the data pages fill the chunks in order."""

    name: str
    size: int
    runs: tuple[tuple[int, int], ...]
    chunks: tuple[ChunkRef, ...]

    @property
    def pages(self) -> int:
        return -(-self.size // PAGE)

    @cached_property
    def _run_page(self) -> list[int]:
        """The stream page where each run's data begins."""
        ends = list(accumulate(zeros + data for zeros, data in self.runs))
        return [end - data for end, (_, data) in zip(ends, self.runs, strict=True)]

    @cached_property
    def _run_data(self) -> list[int]:
        """How many data pages lie before each run."""
        return [0, *accumulate(data for _, data in self.runs)]

    @cached_property
    def _chunk_data(self) -> list[int]:
        """How many data pages lie before each chunk."""
        return [0, *accumulate(chunk.pages for chunk in self.chunks)]

    def extents(self, ordinal: int) -> Iterator[Extent]:
        """Where the pages of chunk `ordinal` lie in the stream."""
        at, end = self._chunk_data[ordinal], self._chunk_data[ordinal + 1]
        begin, run = at, bisect_right(self._run_data, at) - 1
        while at < end:
            count = min(end, self._run_data[run + 1]) - at
            if count:
                yield Extent(self._run_page[run] + at - self._run_data[run], at - begin, count)
            at += count
            run += 1

    def data_runs(self) -> Iterator[tuple[int, int]]:
        """(first page, pages) of every run of data pages."""
        return zip(self._run_page, (data for _, data in self.runs), strict=True)

    def chunks_of(self, first: int, count: int) -> range:
        """The ordinals of the chunks that hold data pages among the `count` pages from `first` on."""
        low, high = self._data_before(first), self._data_before(first + count)
        if low == high:
            return range(0)
        return range(bisect_right(self._chunk_data, low) - 1, bisect_right(self._chunk_data, high - 1))

    def _data_before(self, page: int) -> int:
        run = bisect_right(self._run_page, page) - 1
        if run < 0:
            return 0
        return self._run_data[run] + min(page - self._run_page[run], self.runs[run][1])


def encode(streams: tuple[Stream, ...]) -> bytes:
    out = [_COUNT.pack(len(streams))]
    for stream in streams:
        name = stream.name.encode()
        out += [_NAME.pack(len(name)), name, _SIZE.pack(stream.size)]
        out += [_COUNT.pack(len(stream.runs)), *(_RUN.pack(*run) for run in stream.runs)]
        out += [
            _COUNT.pack(len(stream.chunks)),
            *(_CHUNK.pack(c.id, c.pages, c.stored) for c in stream.chunks),
        ]
    return b"".join(out)


def decode(data: bytes, where: str) -> tuple[Stream, ...]:
    """Raises Untrusted, naming `where`, for an index that does not add up."""
    try:
        return _decode(memoryview(data), where)
    except (struct.error, UnicodeDecodeError, BadRequest) as error:
        raise Untrusted(f"{where} is not an index: {error}") from None


def _decode(data: memoryview, where: str) -> tuple[Stream, ...]:
    at = 0

    def take(layout: struct.Struct) -> tuple[int, ...]:
        nonlocal at
        at += layout.size
        return layout.unpack_from(data, at - layout.size)

    def table(layout: struct.Struct) -> Iterator[tuple[int, ...]]:
        nonlocal at
        (count,) = take(_COUNT)
        begin, at = at, at + count * layout.size
        if at > len(data):
            raise Untrusted(f"{where} is cut short")
        return layout.iter_unpack(data[begin:at])

    streams = []
    (count,) = take(_COUNT)
    for _ in range(count):
        (length,) = take(_NAME)
        name = word(bytes(data[at : at + length]).decode(), "stream")
        at += length
        (size,) = take(_SIZE)
        runs = tuple((zeros, pages) for zeros, pages in table(_RUN))
        chunks = tuple(ChunkRef(*entry) for entry in table(_CHUNK))  # type: ignore[arg-type]
        stream = Stream(name, size, runs, chunks)
        _check(stream, where)
        streams.append(stream)
    if at != len(data):
        raise Untrusted(f"{where} has {len(data) - at} bytes too many")
    if len({stream.name for stream in streams}) != len(streams):
        raise Untrusted(f"{where} names a stream twice")
    return tuple(streams)


def _check(stream: Stream, where: str) -> None:
    pages = sum(zeros + data for zeros, data in stream.runs)
    data = sum(data for _, data in stream.runs)
    if (
        stream.size > _MAX_SIZE
        or pages != stream.pages
        or data != sum(chunk.pages for chunk in stream.chunks)
    ):
        raise Untrusted(f"{where}: the pages of stream {stream.name!r} do not add up")
    if any(not 0 < chunk.pages <= MAX_PAGES for chunk in stream.chunks):
        raise Untrusted(f"{where}: stream {stream.name!r} has a chunk of impossible size")
