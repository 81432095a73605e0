"""The parts of files that an app has mapped and needs up to its first answer: read ahead where the disk must be asked.

Programs and libraries are not in the images: CRIU maps the files of the layers again, and the kernel reads them by
page faults, one after the other, each with a read-ahead as large as the disk's setting (8 MB here: a model server read
150 MB in a hundred faults for 20 MB that it touched). What a copy's page tables point to at its first answer is what it
touched, give or take the sixteen pages that the kernel maps around a fault. The next copy has these read while CRIU
works, all at once and nothing else.

Costs time only if it is wrong: a hint to the page cache. Paths come from the app's own maps and are opened below the
copy's root, never above it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from relume.linux import files

Spans = dict[str, list[tuple[int, int]]]
"""Path inside -> (offset, length) in bytes, in the order of the mappings."""

NAME = "mapped-files"
"""Beside the working set."""

_VERSION = 1
_MOST_BYTES = 1 << 20
"""Of the file; a recording that would be larger is none."""

_AT_ONCE = 8
"""Files that are asked for at the same time."""

_ENTRY = 8
_PRESENT = bytes(byte >> 7 for byte in range(256))
"""Of the last byte of an entry in /proc/PID/pagemap: bit 63. Pages that the app has changed count too: CRIU writes
those over the file's, which the kernel must have read for that."""

_GAP = 16
_RUN = re.compile(rb"\x01(?:\x00{0,%d}\x01)*" % (_GAP - 1))
"""Pages in use, with gaps that cost less to read than a request of their own."""

_ENTRIES_AT_ONCE = 1 << 16
_MOST_ENTRIES = 1 << 25
"""Of a page table that are read at once, and of one process: a sparse file's mapping may have any number of them, and
those of 128 GiB take a second."""


def touched(pids: Iterable[int]) -> Spans:
    """What the page tables of these processes point to now in files; processes that end meanwhile are left out.

    Files of which nothing is in use are there too: a copy's are opened all the same.
    """
    found: dict[str, dict[tuple[int, int], None]] = {}
    for pid in pids:
        try:
            with (
                Path(f"/proc/{pid}/maps").open("rb") as maps,
                Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as table,
            ):
                left = _MOST_ENTRIES
                for start, end, offset, path in _mappings(maps):
                    spans = found.setdefault(path, {})
                    pages = min((end - start) // mmap.PAGESIZE, left)
                    left -= pages
                    for low, high in _runs(table.fileno(), start // mmap.PAGESIZE, pages):
                        spans[offset + low * mmap.PAGESIZE, (high - low) * mmap.PAGESIZE] = None
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return {path: list(spans) for path, spans in found.items()}


def _runs(table: int, first: int, pages: int) -> Iterator[tuple[int, int]]:
    """[low, high) of the pages in use among ``pages`` from number ``first`` on, counted from there."""
    low = high = -_GAP - 1
    for base in range(0, pages, _ENTRIES_AT_ONCE):
        entries = os.pread(table, min(pages - base, _ENTRIES_AT_ONCE) * _ENTRY, (first + base) * _ENTRY)
        for run in _RUN.finditer(entries[_ENTRY - 1 :: _ENTRY].translate(_PRESENT)):
            start, end = base + run.start(), base + run.end()
            if start - high >= _GAP:
                if low >= 0:
                    yield low, high
                low = start
            high = end
    if low >= 0:
        yield low, high


def _mappings(maps: Iterable[bytes]) -> Iterator[tuple[int, int, int, str]]:
    """(start, end, offset, path) of each mapping of a file that has a name (proc_pid_maps(5))."""
    for line in maps:
        fields = line.rstrip(b"\n").split(None, 5)
        if len(fields) < 6 or not fields[5].startswith(b"/") or fields[4] == b"0" or b"\\" in fields[5]:
            continue
        start, end = (int(each, 16) for each in fields[0].split(b"-"))
        yield start, end, int(fields[2], 16), os.fsdecode(fields[5])


def save(path: Path, spans: Spans) -> None:
    """Writes the recording (new file, rename). Raises OSError."""
    body = json.dumps({"version": _VERSION, "files": spans}).encode()
    if len(body) > _MOST_BYTES:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(body + b"\n" + blake3(body).hexdigest().encode() + b"\n")
    temporary.rename(path)


def load(path: Path) -> Spans:
    """The recording in ``path``; nothing where there is none or it is not whole."""
    try:
        with path.open("rb") as file:
            body, _, digest = file.read(_MOST_BYTES + 128).partition(b"\n")
        if blake3(body).hexdigest().encode() != digest.strip():
            return {}
        content = json.loads(body)
        if content["version"] != _VERSION:
            return {}
        return {
            str(name): [(int(at), int(size)) for at, size in spans]
            for name, spans in content["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def read_ahead(root: Path, spans: Spans) -> None:
    """Ask the disk for all of it; returns when it was asked, mostly before it has answered. Never fails."""
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        # Where a file lies the disk must be asked too, several times for each: CRIU does it file by file.
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="mapped-files") as pool:
            for path, ranges in spans.items():
                pool.submit(_ask, top, path, ranges)
    finally:
        os.close(top)


def _ask(top: int, path: str, ranges: Iterable[tuple[int, int]]) -> None:
    with contextlib.suppress(OSError):
        descriptor = files.open_below(top, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                for offset, length in ranges:
                    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
