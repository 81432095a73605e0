"""Pagemaps: offsets in the pages file, the lazy ones among them, and the formats that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relume.errors import ImageError
from relume.images import PAGE_SIZE, Extent, lazy_bytes, read_pagemap, write_image
from relume.images.proto import pagemap_pb2

PARENT, LAZY, PRESENT = 1, 2, 4


def _entry(address: int, pages: int, flags: int) -> pagemap_pb2.pagemap_entry:
    return pagemap_pb2.pagemap_entry(vaddr=address, compat_nr_pages=pages, nr_pages=pages, flags=flags)


def _images(folder: Path, entries: list[Any], pages: int, pid: int = 7) -> None:
    head = pagemap_pb2.pagemap_head(pages_id=pid)
    write_image(folder / f"pagemap-{pid}.img", [head, *entries], kind="PAGEMAP")
    (folder / f"pages-{pid}.img").write_bytes(b"x" * pages * PAGE_SIZE)


def test_present_pages_take_room_lazy_or_not(tmp_path: Path) -> None:
    _images(
        tmp_path,
        [_entry(0x1000, 2, PRESENT), _entry(0x9000, 3, LAZY), _entry(0x20000, 4, PRESENT | LAZY)],
        pages=6,
    )
    pagemap = read_pagemap(tmp_path, 7)
    assert pagemap.extents == (
        Extent(0x1000, 2 * PAGE_SIZE, 0, lazy=False),
        Extent(0x20000, 4 * PAGE_SIZE, 2 * PAGE_SIZE, lazy=True),
    )
    assert [extent.address for extent in pagemap.lazy] == [0x20000]
    assert pagemap.pages == tmp_path / "pages-7.img"
    assert lazy_bytes(tmp_path) == {7: 4 * PAGE_SIZE}


def test_entries_of_old_dumps_have_no_flags(tmp_path: Path) -> None:
    _images(tmp_path, [pagemap_pb2.pagemap_entry(vaddr=0x1000, compat_nr_pages=2)], pages=2)
    assert read_pagemap(tmp_path, 7).extents == (Extent(0x1000, 2 * PAGE_SIZE, 0, lazy=False),)


def test_a_short_pages_file_is_refused(tmp_path: Path) -> None:
    _images(tmp_path, [_entry(0x1000, 3, PRESENT | LAZY)], pages=2)
    with pytest.raises(ImageError, match="is short"):
        read_pagemap(tmp_path, 7)


def test_a_missing_pages_file_is_refused(tmp_path: Path) -> None:
    _images(tmp_path, [_entry(0x1000, 1, PRESENT)], pages=1)
    (tmp_path / "pages-7.img").unlink()
    with pytest.raises(ImageError, match=r"pages-7\.img"):
        read_pagemap(tmp_path, 7)


def test_a_process_without_pages_has_no_pages_file(tmp_path: Path) -> None:
    _images(tmp_path, [], pages=0)
    (tmp_path / "pages-7.img").unlink()
    assert read_pagemap(tmp_path, 7).extents == ()


def test_incremental_dumps_are_refused(tmp_path: Path) -> None:
    _images(tmp_path, [_entry(0x1000, 1, PARENT)], pages=0)
    with pytest.raises(ImageError, match="parent image"):
        read_pagemap(tmp_path, 7)


@pytest.mark.parametrize("flags", [8 | PRESENT, 64])
def test_unknown_flags_are_refused_by_name(tmp_path: Path, flags: int) -> None:
    _images(tmp_path, [_entry(0x1000, 1, flags)], pages=1)
    with pytest.raises(ImageError, match=r"compressed pages of CRIU 4\.3"):
        read_pagemap(tmp_path, 7)


@pytest.mark.parametrize("where", ["head", "entry"])
def test_unknown_fields_are_refused_by_name(tmp_path: Path, where: str) -> None:
    head = pagemap_pb2.pagemap_head(pages_id=7)
    entry = _entry(0x1000, 1, PRESENT)
    # Field 12, a varint: what a newer CRIU would add.
    (head if where == "head" else entry).MergeFromString(b"\x60\x05")
    write_image(tmp_path / "pagemap-7.img", [head, entry], kind="PAGEMAP")
    (tmp_path / "pages-7.img").write_bytes(b"x" * PAGE_SIZE)
    with pytest.raises(ImageError, match="fields"):
        read_pagemap(tmp_path, 7)
