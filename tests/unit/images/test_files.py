"""Image files: what is read back is what was written; whatever is not whole or not known is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from relume.errors import ImageError
from relume.images import Entry, read_entries, read_image, write_image
from relume.images.formats import BY_NAME, COMMON
from relume.images.proto import inventory_pb2, pipe_data_pb2, pstree_pb2


def _process(pid: int) -> pstree_pb2.pstree_entry:
    return pstree_pb2.pstree_entry(pid=pid, ppid=0, pgid=pid, sid=pid, threads=[pid, pid + 1])


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "pstree.img"
    write_image(path, [_process(1), _process(7)], kind="PSTREE")
    assert [entry.pid for entry in read_image(path)] == [1, 7]
    assert path.read_bytes()[:8] == struct.pack("<II", COMMON, BY_NAME["PSTREE"].magic)


def test_inventory_has_no_common_magic(tmp_path: Path) -> None:
    path = tmp_path / "inventory.img"
    write_image(path, [inventory_pb2.inventory_entry(img_version=2)], kind="INVENTORY")
    assert path.read_bytes()[:4] == struct.pack("<I", BY_NAME["INVENTORY"].magic)
    assert read_image(path)[0].img_version == 2


def test_raw_data_behind_an_entry_is_kept_and_never_lost_by_accident(tmp_path: Path) -> None:
    path = tmp_path / "pipes-data.img"
    queued = [
        Entry(pipe_data_pb2.pipe_data_entry(pipe_id=3, bytes=5), b"hello"),
        Entry(pipe_data_pb2.pipe_data_entry(pipe_id=4, bytes=0)),
    ]
    write_image(path, queued, kind="PIPES_DATA")
    kind, entries = read_entries(path)
    assert kind.name == "PIPES_DATA"
    assert [(entry.message.pipe_id, entry.extra) for entry in entries] == [(3, b"hello"), (4, b"")]
    with pytest.raises(ImageError, match="raw data"):
        read_image(path)


def test_rewriting_keeps_kind_owner_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "pstree.img"
    write_image(path, [_process(1)], kind="PSTREE")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 12345, 54321)
    before = path.stat()
    write_image(path, [_process(2)], sync=True)
    after = path.stat()
    assert read_image(path)[0].pid == 2
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert [found.name for found in tmp_path.iterdir()] == ["pstree.img"]


@pytest.mark.parametrize("cut", [2, 6, 9, 14])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "pstree.img"
    write_image(path, [_process(1)], kind="PSTREE")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ImageError, match="ends early"):
        read_image(path)


def test_an_unknown_magic_is_named(tmp_path: Path) -> None:
    path = tmp_path / "what.img"
    path.write_bytes(struct.pack("<II", COMMON, 0x12345678))
    with pytest.raises(ImageError, match=r"what\.img.*0x12345678"):
        read_image(path)


def test_a_message_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pstree.img"
    path.write_bytes(struct.pack("<III", COMMON, BY_NAME["PSTREE"].magic, 3) + b"\xff\xff\xff")
    with pytest.raises(ImageError, match="damaged"):
        read_image(path)
    write_image(path, [pstree_pb2.pstree_entry(pid=1, ppid=0, pgid=1, sid=1)])
    assert read_image(path)[0].pid == 1


def test_a_missing_file_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "core-1.img")
