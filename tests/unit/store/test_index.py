"""Cutting and finding again, against the simplest model there is: the bytes themselves."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relume.errors import Untrusted
from relume.store import chunks
from relume.store.chunks import PAGE, Splitter
from relume.store.index import ChunkRef, Stream, decode, encode

streams = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=12
)  # (which page content, how often in a row); 0 is the zero page


def content(shape: list[tuple[int, int]], tail: int) -> bytes:
    pages = b"".join((bytes([kind]) * PAGE) * count for kind, count in shape)
    return pages + b"t" * tail


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MIN_PAGES", 2)
    monkeypatch.setattr(chunks, "MAX_PAGES", 16)
    monkeypatch.setattr(chunks, "_MEAN", 4)


def split(data: bytes, cut: int = 0x9E3779B97F4A7C15) -> tuple[Stream, list[bytes]]:
    splitter = Splitter(io.BytesIO(data), cut)
    pieces = list(splitter)
    refs = tuple(ChunkRef(bytes([at % 256]) * 32, len(piece) // PAGE, 1) for at, piece in enumerate(pieces))
    return Stream("s", splitter.size, tuple(splitter.runs), refs), pieces


@given(streams, st.integers(0, PAGE - 1))
@settings(max_examples=200)
def test_the_chunks_are_the_stream(shape: list[tuple[int, int]], tail: int) -> None:
    data = content(shape, tail)
    stream, pieces = split(data)
    assert stream.size == len(data)
    rebuilt = bytearray(stream.pages * PAGE)
    for ordinal, piece in enumerate(pieces):
        assert len(piece) % PAGE == 0
        assert all(piece[at : at + PAGE] != bytes(PAGE) for at in range(0, len(piece), PAGE))
        for extent in stream.extents(ordinal):
            part = piece[extent.within * PAGE : (extent.within + extent.pages) * PAGE]
            rebuilt[extent.page * PAGE : (extent.page + extent.pages) * PAGE] = part
    assert rebuilt[: stream.size] == data
    assert decode(encode((stream,)), "test") == (stream,)


@given(streams, st.data())
def test_the_chunks_of_a_range(shape: list[tuple[int, int]], data: st.DataObject) -> None:
    stream, pieces = split(content(shape, 0))
    first = data.draw(st.integers(0, stream.pages))
    count = data.draw(st.integers(0, stream.pages - first))
    wanted = {
        ordinal
        for ordinal in range(len(pieces))
        for extent in stream.extents(ordinal)
        if set(range(first, first + count)) & set(range(extent.page, extent.page + extent.pages))
    }
    assert set(stream.chunks_of(first, count)) == wanted


def test_what_follows_a_change_is_cut_as_before() -> None:
    import random

    pages = random.Random(5).randbytes(400 * PAGE)
    _, before = split(pages)
    _, after = split(b"\1" * PAGE * 3 + pages)
    assert len(set(after) - set(before)) <= 3
    _, otherwise = split(pages, cut=0xD1B54A32D192ED03)
    assert len(set(otherwise) & set(before)) < len(before) / 2, "another tenant cuts elsewhere"


@given(streams, st.data())
@settings(max_examples=200)
def test_a_damaged_index_is_refused_or_adds_up(shape: list[tuple[int, int]], data: st.DataObject) -> None:
    good = encode((split(content(shape, 1))[0],))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    try:
        for stream in decode(bad, "test"):
            for ordinal in range(len(stream.chunks)):
                assert all(extent.page + extent.pages <= stream.pages for extent in stream.extents(ordinal))
    except Untrusted:
        pass
    for cut in {0, at, len(good) - 1} - {len(good)}:
        with pytest.raises(Untrusted):
            decode(good[:cut], "test")
    with pytest.raises(Untrusted, match="too many"):
        decode(good + b"x", "test")


@pytest.mark.parametrize("name", ["../x", "a/b", "", "x" * 200, "..", "\0"])
def test_stream_names_are_plain(name: str) -> None:
    with pytest.raises(Untrusted):
        decode(encode((Stream(name, 0, (), ()),)), "test")


def test_a_stream_twice_is_refused() -> None:
    stream = Stream("s", 0, (), ())
    with pytest.raises(Untrusted, match="twice"):
        decode(encode((stream, stream)), "test")
