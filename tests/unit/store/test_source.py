"""The pager's seam: addresses behind which every byte was verified."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from relume.errors import ImageError, Untrusted
from relume.store import LocalCheckpoint, Region, RemoteSource
from relume.store.chunks import PAGE

Nodes = Callable[..., Region]


def published(region: Region, source: LocalCheckpoint) -> None:
    with region.lease(source.app, source.build, source.platform).kept() as lease:
        region.publish(lease, source)


def test_load_gives_the_address_of_the_right_bytes(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    published(node("a"), checkpoint)
    b = node("b")
    fetched = b.fetch(b.names()[0])
    source = RemoteSource(fetched.pages, "pages-1.img")
    original = (checkpoint.images / "pages-1.img").read_bytes()
    assert source.size == len(original)
    assert not source.ready(PAGE, PAGE)
    for offset, length in ((PAGE, PAGE), (600 * PAGE, 50 * PAGE), (0, len(original))):
        source.prefetch(offset, length)
        assert ctypes.string_at(source.load(offset, length), length) == original[offset : offset + length]
        assert source.ready(offset, length)
    source.close()
    fetched.close()


def test_bytes_that_do_not_come_or_are_wrong(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    published(node("a"), checkpoint)
    b = node("b")
    fetched = b.fetch(b.names()[0])
    source = RemoteSource(fetched.pages, "pages-1.img")
    for chunk in (tmp_path / "store" / "chunk").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:-3] + b"abc")
    with pytest.raises(Untrusted):
        source.load(PAGE, PAGE)
    for chunk in (tmp_path / "store" / "chunk").rglob("*"):
        if chunk.is_file():
            chunk.unlink()
    with pytest.raises(ImageError, match="did not come"):
        source.load(PAGE, PAGE)
    source.close()
    fetched.close()
