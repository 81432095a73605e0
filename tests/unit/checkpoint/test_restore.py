"""What is checked of a checkpoint before CRIU gets it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from relume.checkpoint.restore import Restoration
from relume.checkpoint.shelf import Shelf
from relume.errors import ImageError, RelumeError, Untrusted
from relume.images import integrity

PAGES = bytes(range(256)) * 16384  # 4 MiB: two blocks


@pytest.fixture
def restoration(shelf: Shelf, begun: Any, checkpoint_of: Any, tmp_path: Path) -> Restoration:
    directory, intent = begun()
    images = directory / "images"
    (images / "pages-1.img").write_bytes(PAGES)
    (images / "pages-2.img").write_bytes(b"")
    (images / "core-1.img").write_bytes(b"registers")
    integrity.record(images)
    checkpoint = checkpoint_of(intent, lazy_bytes=1000)
    shelf.publish(intent.dump_id, checkpoint)
    return Restoration(shelf, checkpoint, 524288, None)


@pytest.mark.parametrize("pages", [False, True])
def test_whole(restoration: Restoration, pages: bool) -> None:
    restoration.verify(pages=pages)


@pytest.mark.parametrize("name", ["core-1.img", "pages-1.img"])
@pytest.mark.parametrize("damage", ["flipped", "short", "long", "empty"])
def test_damaged(restoration: Restoration, name: str, damage: str) -> None:
    path = restoration.images / name
    content = path.read_bytes()
    path.write_bytes(
        {
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
            "short": content[:-1],
            "long": content + b"\0",
            "empty": b"",
        }[damage]
    )
    with pytest.raises((Untrusted, ImageError)) as refused:
        restoration.verify(pages=True)
    assert name in refused.value.message


@pytest.mark.parametrize("name", ["core-1.img", "pages-1.img", "integrity.json"])
def test_missing(restoration: Restoration, name: str) -> None:
    (restoration.images / name).unlink()
    with pytest.raises(RelumeError) as refused:
        restoration.verify(pages=True)
    assert isinstance(refused.value, ImageError) and name in refused.value.message


def test_pages_are_left_to_the_pager(restoration: Restoration) -> None:
    """Which checks each block when it first reads it; the small images are checked here all the same."""
    (restoration.images / "pages-1.img").write_bytes(b"x" + PAGES[1:])
    restoration.verify(pages=False)
    (restoration.images / "core-1.img").write_bytes(b"x")
    with pytest.raises(Untrusted):
        restoration.verify(pages=False)


def test_what_was_checked_in_this_boot_is_not_read_again(restoration: Restoration, tmp_path: Path) -> None:
    """Per file, by device, inode and change time: a change is seen."""
    remembering = Restoration(restoration.shelf, restoration.checkpoint, 524288, tmp_path / "verified")
    remembering.verify(pages=True)
    assert any((tmp_path / "verified").rglob("*"))
    remembering.verify(pages=True)
    with (restoration.images / "pages-1.img").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(Untrusted):
        remembering.verify(pages=True)


def test_of_a_whole_layer_a_copy_gets_its_own_files(restoration: Restoration, tmp_path: Path) -> None:
    top = restoration.shelf.directory(restoration.checkpoint.checkpoint_id) / "held"
    (top / "data").mkdir()
    for name in ("data/db", "data/other"):
        (top / name).write_text(name)
    for number, own_files in enumerate((["data/db"], [])):  # an older revision wrote none
        upper = tmp_path / str(number)
        upper.mkdir()
        checkpoint = dataclasses.replace(restoration.checkpoint, filesystem="all", own_files=own_files)
        copy = dataclasses.replace(restoration, checkpoint=checkpoint)
        copy.lay_files(upper)
        assert [str(path.relative_to(upper)) for path in upper.rglob("*") if path.is_file()] == own_files
        assert copy.lower_layer == top


def test_the_root_of_a_copy_is_as_it_was(restoration: Restoration, tmp_path: Path) -> None:
    """With the whole layer saved too, for overlay takes the attributes of "/" from the topmost directory."""
    top = restoration.shelf.directory(restoration.checkpoint.checkpoint_id) / "held"
    top.chmod(0o1750)
    os.chown(top, 5, 6)
    for filesystem in ("held", "all"):
        upper = tmp_path / filesystem
        upper.mkdir()
        checkpoint = dataclasses.replace(restoration.checkpoint, filesystem=filesystem)
        dataclasses.replace(restoration, checkpoint=checkpoint).lay_files(upper)
        status = upper.stat()
        assert (status.st_uid, status.st_gid) == (restoration.id_base + 5, restoration.id_base + 6)
        assert status.st_mode & 0o7777 == 0o1750
