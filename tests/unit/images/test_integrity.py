"""Hashes of images: any flipped bit is found, once per boot each block is enough, the record itself is checked."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relume.errors import ImageError, Untrusted
from relume.images import integrity
from relume.images.integrity import BLOCK_BYTES, RECORD_NAME, Verifier, read_record, record

SIZE = 2 * BLOCK_BYTES + 3 * 4096


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "core-1.img").write_bytes(b"core")
    (folder / "pages-1.img").write_bytes(os.urandom(SIZE))
    (folder / "dump.log").write_text("not an image")
    record(folder)
    return folder


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def _check(images: Path, runtime: Path | None, offset: int, length: int) -> int:
    pages = Verifier(images, runtime).pages(images / "pages-1.img")
    content = memoryview((images / "pages-1.img").read_bytes())
    pages.check(content, offset, length)
    assert pages.known(offset, length)
    hashed = pages.hashed_bytes
    pages.close()
    return hashed


def test_what_was_written_passes(images: Path) -> None:
    Verifier(images).check_small()
    assert _check(images, None, 0, SIZE) == SIZE


def test_each_block_is_hashed_once_per_boot(images: Path, tmp_path: Path) -> None:
    assert _check(images, tmp_path, BLOCK_BYTES + 4096, 4096) == BLOCK_BYTES
    assert _check(images, tmp_path, BLOCK_BYTES, BLOCK_BYTES) == 0
    assert _check(images, tmp_path, BLOCK_BYTES - 1, 2) == BLOCK_BYTES


def test_a_changed_file_is_not_remembered(images: Path, tmp_path: Path) -> None:
    _check(images, tmp_path, 0, SIZE)
    _flip(images / "pages-1.img", BLOCK_BYTES + 7)
    assert _check(images, tmp_path, 0, BLOCK_BYTES) == BLOCK_BYTES
    with pytest.raises(Untrusted, match=r"pages-1\.img: the 2 MiB at 0x200000"):
        _check(images, tmp_path, BLOCK_BYTES, 4096)


def test_the_last_partial_block_counts(images: Path) -> None:
    _flip(images / "pages-1.img", SIZE - 1)
    with pytest.raises(Untrusted):
        _check(images, None, SIZE - 4096, 4096)


def test_a_short_pages_file_is_refused(images: Path) -> None:
    os.truncate(images / "pages-1.img", SIZE - 4096)
    with pytest.raises(ImageError, match="short"):
        _check(images, None, 0, 4096)


def test_small_images(images: Path, tmp_path: Path) -> None:
    Verifier(images, tmp_path).check_small()
    Verifier(images, tmp_path).check_small()
    _flip(images / "core-1.img", 1)
    with pytest.raises(Untrusted, match=r"core-1\.img"):
        Verifier(images, tmp_path).check_small()


def test_missing_and_added_images(images: Path) -> None:
    (images / "more.img").write_bytes(b"")
    with pytest.raises(Untrusted, match=r"more\.img"):
        Verifier(images).check_small()
    (images / "more.img").unlink()
    (images / "core-1.img").unlink()
    with pytest.raises(ImageError, match=r"core-1\.img is missing"):
        Verifier(images).check_small()


def test_the_record_protects_itself(images: Path) -> None:
    assert read_record(images) is not None
    _flip(images / RECORD_NAME, 20)
    with pytest.raises(ImageError, match="damaged"):
        read_record(images)


def test_without_a_record_there_is_nothing_to_trust(images: Path) -> None:
    (images / RECORD_NAME).unlink()
    assert read_record(images) is None
    with pytest.raises(ImageError, match="has no integrity"):
        Verifier(images)


def test_what_earlier_boots_left_is_removed(images: Path, tmp_path: Path) -> None:
    stale = tmp_path / "verified" / "00000000-0000-0000-0000-000000000000"
    stale.mkdir(parents=True)
    (stale / "fe00-1-2-3").write_bytes(b"\1")
    _check(images, tmp_path, 0, SIZE)
    assert not stale.exists()


def _check_all(images: Path, runtime: Path | None = None) -> int:
    pages = Verifier(images, runtime).pages(images / "pages-1.img")
    try:
        pages.check_all()
        return pages.hashed_bytes
    finally:
        pages.close()


def test_a_whole_file_is_read_but_for_what_is_known(images: Path, tmp_path: Path) -> None:
    _check(images, tmp_path, 0, 1)
    assert _check_all(images, tmp_path) == SIZE - BLOCK_BYTES
    assert _check_all(images, tmp_path) == 0
    _flip(images / "pages-1.img", SIZE - 1)
    with pytest.raises(Untrusted, match="the 2 MiB at 0x400000"):
        _check_all(images, tmp_path)


def test_a_file_that_becomes_short_while_it_is_read(images: Path) -> None:
    pages = Verifier(images).pages(images / "pages-1.img")
    os.truncate(images / "pages-1.img", BLOCK_BYTES + 1)
    with pytest.raises(Untrusted, match="the 2 MiB at 0x200000"):
        pages.check_all()


def test_a_disk_that_does_not_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(integrity, "_filled", fail)
    with pytest.raises(ImageError, match="cannot be read"):
        _check_all(images)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
@pytest.mark.parametrize("kib", [0, 4, 12])
def test_no_room_to_remember(images: Path, tmp_path: Path, kib: int) -> None:
    """A full /run costs what it would have remembered; a hole in there, written to, would be the node's end."""
    for number in range(8):
        (images / f"core-{number}.img").write_bytes(b"core")
    record(images)
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    code = f"""
import sys
from pathlib import Path
from relume.images import integrity
from relume.images.integrity import Verifier
images, runtime = map(Path, sys.argv[1:])
with (runtime / "filling").open("wb", buffering=0) as file:
    file.write(bytes({16 - kib} << 10))
verifier = Verifier(images, runtime)
verifier.check_small()
verifier.pages(images / "pages-1.img").check_all()
"""
    mounted = 'mount -t tmpfs -o size=16k none "$2" && exec "$0" -c "$CODE" "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mounted, sys.executable, str(images), str(runtime)],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_what_goes_is_forgotten(images: Path, tmp_path: Path) -> None:
    Verifier(images, tmp_path).check_small()
    _check_all(images, tmp_path)
    (kept,) = (tmp_path / "verified").iterdir()
    assert len(list(kept.iterdir())) == 2
    integrity.forget(images, tmp_path)
    assert list(kept.iterdir()) == []
