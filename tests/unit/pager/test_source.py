"""Pages files as a source: addresses of the right bytes, verified before they leave, errors instead of signals."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from pathlib import Path
from typing import cast

import pytest

from relume.errors import ImageError, PagerError, Untrusted
from relume.images.integrity import BLOCK_BYTES, Verifier, record
from relume.linux import memory, syscall
from relume.pager import source as module
from relume.pager.source import FileSource
from relume.store import RemoteSource
from relume.store.pages import RemotePages
from relume.store.working_set import PageRun

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


class Short:
    """A C library whose madvise(2) finds no memory so many times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self._real = syscall.libc()

    def madvise(self, *arguments: object) -> int:
        if not self.times:
            return int(self._real.madvise(*arguments))
        self.times -= 1
        ctypes.set_errno(errno.ENOMEM)
        return -1


def test_memory_that_is_short_for_a_moment_is_waited_for(
    pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, short = FileSource(pages), Short(3)
    monkeypatch.setattr(syscall, "libc", lambda: short)
    assert ctypes.string_at(source.load(PAGE, PAGE), PAGE) == pages.read_bytes()[PAGE : 2 * PAGE]
    assert not short.times
    source.close()


def test_memory_that_stays_short_is_not_the_disks_fault(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, short = FileSource(pages), Short(1 << 30)
    monkeypatch.setattr(syscall, "libc", lambda: short)
    monkeypatch.setattr(module, "MEMORY_PATIENCE_SECONDS", 0.05)
    with pytest.raises(PagerError, match="no memory"):
        source.load(PAGE, PAGE)
    source.close()


def test_what_is_ready_is_what_would_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a verifier whole blocks are: the page may be in memory, and its block on the disk."""
    with tempfile.TemporaryDirectory(
        dir="/var/tmp"
    ) as folder:  # on a disk: a tmpfs has no page cache to be without
        path = Path(folder) / "pages-1.img"
        path.write_bytes(os.urandom(SIZE))
        record(path.parent)
        runtime = Path(folder) / "runtime"
        verified = FileSource(path, Verifier(path.parent, runtime).pages(path))
        verified.load(0, SIZE)
        verified.close()
        again = FileSource(path, Verifier(path.parent, runtime).pages(path))
        assert again.ready(0, PAGE)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(file.fileno(), PAGE, 0)
        plain = FileSource(path)
        if plain.ready(0, BLOCK_BYTES) or not plain.ready(0, PAGE):
            pytest.skip("this file system keeps its pages")
        assert not again.ready(0, PAGE)
        again.load(0, PAGE)
        assert again.ready(0, BLOCK_BYTES)
        again.close()
        plain.close()


@pytest.mark.parametrize("kind", ["plain", "verified", "remote"])
def test_what_has_left_memory_is_not_ready_and_is_brought_again(kind: str) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder) / "pages-1.img"
        path.write_bytes(os.urandom(SIZE))
        record(path.parent)
        if kind == "remote":
            source: FileSource | RemoteSource = RemoteSource(cast(RemotePages, All(path)), path.name)
        else:
            source = FileSource(path, Verifier(path.parent).pages(path) if kind == "verified" else None)
        source.load(0, SIZE)
        assert source.ready(0, SIZE)
        source._map.madvise(mmap.MADV_DONTNEED)  # what is mapped stays in memory
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if memory.resident(source._address, SIZE):
            pytest.skip("this file system keeps its pages")
        assert not source.ready(PAGE, PAGE)
        source.load(PAGE, PAGE)
        assert source.ready(PAGE, PAGE)
        assert getattr(source, "hashed_bytes", 0) == (SIZE if kind == "verified" else 0)
        source.close()


def test_what_has_left_holds_up_nothing_else(pages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a verified block whose neighbour pages were evicted what is asked for counts, not the whole block."""
    record(pages.parent)
    source = FileSource(pages, Verifier(pages.parent).pages(pages))
    source.load(0, SIZE)
    gone = source._address + 5 * PAGE
    monkeypatch.setattr(memory, "resident", lambda address, length: not address <= gone < address + length)
    populated: list[tuple[int, int]] = []
    monkeypatch.setattr(source, "_populate", lambda offset, length: populated.append((offset, length)))
    assert not source.ready(0, 16 * PAGE)
    assert source.ready(0, PAGE)
    source.load(5 * PAGE, PAGE)
    assert populated == [(5 * PAGE, PAGE)]
    source.close()


class All:
    """Pages of a store all of which have come."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def path(self, stream: str) -> Path:
        return self._path

    def present(self, stream: str, first: int, count: int) -> bool:
        return True

    def ensure(self, stream: str, first: int, count: int) -> None:
        pass

    def read(self, run: PageRun) -> bytes:
        with self._path.open("rb") as file:
            return os.pread(file.fileno(), run.pages * PAGE, run.first * PAGE)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pages-9\.img"):
        FileSource(tmp_path / "pages-9.img")
