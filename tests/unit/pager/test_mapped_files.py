"""What a process touched of its mapped files, and reading just that ahead: with real files, maps and page cache."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.linux import syscall
from relume.pager import mapped_files

PAGE = mmap.PAGESIZE
MEGABYTE = 1 << 20


@pytest.fixture
def place() -> Iterator[Path]:
    """On a disk: a tmpfs has no page cache to be without."""
    path = Path("/var/tmp") / f"relume-mapped-{os.getpid()}"
    path.mkdir()
    yield path
    for each in path.iterdir():
        each.unlink()
    path.rmdir()


def resident(path: Path) -> list[bool]:
    """Which pages of the file the page cache has (mincore(2))."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        anchor = ctypes.c_char.from_buffer(content)
        vector = ctypes.create_string_buffer(len(content) // PAGE)
        address = ctypes.c_void_p(ctypes.addressof(anchor))
        assert syscall.libc().mincore(address, ctypes.c_size_t(len(content)), vector) == 0
        del anchor
    return [bool(byte & 1) for byte in vector.raw]


def cold(path: Path, size: int) -> None:
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_what_was_touched_is_found(place: Path) -> None:
    path = place / "a library.so"
    cold(path, 4 * MEGABYTE)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    content.madvise(mmap.MADV_RANDOM)
    for at in (0, 2 * MEGABYTE):
        assert content[at] >= 0
    spans = mapped_files.touched([os.getpid(), 2**22 - 1])[str(path)]
    found = {page for offset, length in spans for page in range(offset // PAGE, (offset + length) // PAGE)}
    assert {0, 2 * MEGABYTE // PAGE} <= found
    assert len(found) < 128, "the kernel maps some pages around a fault, and no more"
    content.close()


def test_a_sparse_mapping_costs_no_memory(place: Path) -> None:
    """8 bytes for each of its pages, touched or not: the whole table of an LMDB map would be gigabytes."""
    path, size = place / "data.mdb", 64 << 30
    with path.open("wb") as file:
        file.truncate(size)
    edge = mapped_files._ENTRIES_AT_ONCE * PAGE
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    content.madvise(mmap.MADV_RANDOM)
    for at in (edge - PAGE, edge, size - PAGE):
        assert content[at] == 0
    # On huge pages, and with what the kernel maps around a fault, more is in use than was asked for.
    tracemalloc.start()
    spans = mapped_files.touched([os.getpid()])[str(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    content.close()
    assert len(spans) == 2
    (first, length), (last, rest) = spans
    assert first <= edge - PAGE and first + length >= edge + PAGE
    assert last <= size - PAGE and last + rest == size
    assert length + rest < 8 * MEGABYTE
    assert peak < 16 * MEGABYTE


def test_no_more_of_a_page_table_is_read_than_is_worth_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold(place / "file", MEGABYTE)
    with (place / "file").open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    assert content[0] >= 0
    monkeypatch.setattr(mapped_files, "_MOST_ENTRIES", 0)
    assert not any(mapped_files.touched([os.getpid()]).values())
    content.close()


def test_only_that_is_read_ahead(place: Path) -> None:
    cold(place / "file", 8 * MEGABYTE)
    before = resident(place / "file")
    if any(before):
        pytest.skip("this file system keeps its pages")
    mapped_files.read_ahead(place, {"/file": [(MEGABYTE, MEGABYTE)], "/missing": [(0, PAGE)]})
    wanted = range(MEGABYTE // PAGE, 2 * MEGABYTE // PAGE)
    deadline = time.monotonic() + 20
    while not all((after := resident(place / "file"))[page] for page in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sum(after) <= 2 * len(wanted)


def test_links_don_t_lead_out(place: Path, tmp_path: Path) -> None:
    cold(tmp_path / "outside", MEGABYTE)
    (place / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(place / "fifo")
    mapped_files.read_ahead(place, {"/link": [(0, PAGE)], "/../x": [(0, PAGE)], "/fifo": [(0, 1)]})
    mapped_files.read_ahead(place / "none", {"/link": [(0, PAGE)]})


def test_a_recording_is_read_back(tmp_path: Path) -> None:
    spans: mapped_files.Spans = {"/usr/lib/ä.so": [(0, PAGE), (8 * PAGE, 3 * PAGE)]}
    mapped_files.save(tmp_path / "recorded", spans)
    assert mapped_files.load(tmp_path / "recorded") == spans
    mapped_files.save(tmp_path / "huge", {f"/{number:0200}": [(0, PAGE)] for number in range(9000)})
    assert not (tmp_path / "huge").exists()


@pytest.mark.parametrize("change", ["cut", "flip", "version", "nonsense", "missing"])
def test_anything_else_is_nothing(tmp_path: Path, change: str) -> None:
    path = tmp_path / "recorded"
    mapped_files.save(path, {"/lib": [(0, PAGE)]})
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "version":
        path.write_bytes(content.replace(b'"version": 1', b'"version": 2'))
    else:
        other = {
            "cut": content[:20],
            "flip": content.replace(b"lib", b"lob"),
            "nonsense": json.dumps([1]).encode(),
        }
        path.write_bytes(other[change])
    assert mapped_files.load(path) == {}
