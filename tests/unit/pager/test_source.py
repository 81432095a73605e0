"""Pages files as a source: addresses of the right bytes, verified before they leave, errors instead of signals."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from relume.errors import ImageError, Untrusted
from relume.images.integrity import BLOCK_BYTES, Verifier, record
from relume.pager.source import FileSource

PAGE = 4096
SIZE = BLOCK_BYTES + 16 * PAGE


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    path = tmp_path / "pages-1.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_the_bytes_lie_where_it_says(pages: Path) -> None:
    source = FileSource(pages)
    offset = BLOCK_BYTES - 2 * PAGE
    address = source.load(offset, 4 * PAGE)
    assert ctypes.string_at(address, 4 * PAGE) == pages.read_bytes()[offset : offset + 4 * PAGE]
    assert source.ready(offset, 4 * PAGE)
    assert source.hashed_bytes == 0
    source.close()


def test_nothing_leaves_unverified(pages: Path) -> None:
    record(pages.parent)
    data = bytearray(pages.read_bytes())
    data[BLOCK_BYTES + 5] ^= 1
    pages.write_bytes(data)
    source = FileSource(pages, Verifier(pages.parent).pages(pages))
    assert not source.ready(0, PAGE)
    source.load(0, PAGE)
    assert source.ready(0, BLOCK_BYTES)
    assert source.hashed_bytes == BLOCK_BYTES
    with pytest.raises(Untrusted):
        source.load(BLOCK_BYTES - PAGE, 2 * PAGE)
    source.close()


def test_a_file_that_was_cut_short_is_an_error_not_a_signal(pages: Path) -> None:
    source = FileSource(pages)
    os.truncate(pages, BLOCK_BYTES // 2)
    with pytest.raises(ImageError, match="cannot be read"):
        source.load(BLOCK_BYTES - PAGE, PAGE)
    source.close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pages-9\.img"):
        FileSource(tmp_path / "pages-9.img")
