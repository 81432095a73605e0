"""Pages that come from the store when they are needed, into sparse files that the pager maps.

`RemotePages` fills a directory's page images: on demand (`ensure`, which blocks until the pages are there), ahead
of it in the working set's order (`prefetch`), and in the end all of them (`fill`). A page counts as present once
its bytes were verified: those that came in this process by their object's authentication and hash, those found on
the disk by hashing them again. Nothing else is recorded, so there is nothing to be wrong after a crash, and
two pagers of one checkpoint share what either has fetched.

A chunk that reads wrong is fetched once more past every cache; if it is wrong again, Untrusted is raised and the
instance must not run on. A store that does not answer holds a fault for `Patience.bound_s` seconds, then raises.
"""

from __future__ import annotations

import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from blake3 import blake3

from relume.errors import StoreError, Untrusted
from relume.linux.files import start_writing
from relume.store import faults
from relume.store._malloc import large_buffers_kept
from relume.store.chunks import PAGE, Chunks
from relume.store.index import Stream
from relume.store.upload import Progress
from relume.store.working_set import PageRun, WorkingSet

log = logging.getLogger(__name__)

_ZERO = bytes(PAGE)
_WRITE_EVERY = 16
"""Chunks that `fill` lets come before it has what came written to the disk. Left to the sync at the end, the disk waits
for the network and then all wait for the disk, for a quarter of a download's time (`relume bench --region`)."""


class RemotePages:
    """The streams of one checkpoint below `directory`, present page by page. Safe to use from many threads."""

    def __init__(
        self,
        directory: Path,
        streams: tuple[Stream, ...],
        chunks: Chunks,
        working_set: WorkingSet | None = None,
    ) -> None:
        """Files that are missing are made, as large as their stream and empty."""
        self.directory = directory
        self.working_set = working_set
        self.progress = Progress(total=sum(ref.pages for stream in streams for ref in stream.chunks) * PAGE)
        self._chunks = chunks
        self._files = {stream.name: _File(directory / stream.name, stream) for stream in streams}
        self._flights: dict[object, Future[None]] = {}
        self._landed = threading.Condition()  # guards the flights; told when one ends
        self._stopped = threading.Event()
        self._bad_parts: set[int] = set()
        self._parts = _parts_by_page(working_set) if working_set else {}

    def close(self) -> None:
        """End `prefetch` and `fill`, wait for requests on their way (up to `Patience`), close the files."""
        with self._landed:
            self._stopped.set()
            self._landed.wait_for(lambda: not self._flights)
        for file in self._files.values():
            file.close()

    def path(self, stream: str) -> Path:
        return self._files[stream].path

    def present(self, stream: str, first: int, count: int) -> bool:
        """Would `ensure` return at once?"""
        return self._files[stream].missing(first, count) < 0

    def ensure(self, stream: str, first: int, count: int) -> None:
        """Return once the `count` pages from page `first` on are in the file. Raises Untrusted, StoreError, OSError."""
        file = self._files[stream]
        while (page := file.missing(first, count)) >= 0:
            if (part := self._part_of(stream, page)) is not None:
                self._once(part, partial(self._fetch_part, part))
            else:
                (ordinal,) = file.stream.chunks_of(page, 1)
                self._once((stream, ordinal), partial(self._fetch_chunk, file, ordinal))

    def read(self, run: PageRun) -> bytes:
        """The pages of `run`, fetched first where they are missing. Raises as `ensure`."""
        self.ensure(run.stream, run.first, run.pages)
        return self._files[run.stream].read(run.first, run.pages)

    def prefetch(self, parallel: int = 4) -> None:
        """Fetch the working set, in its order. Returns when it is there, or `close` was called."""
        if self.working_set is not None:
            parts = range(len(self.working_set.parts))
            self._all(parallel, [partial(self._prefetch_part, part) for part in parts])

    def fill(self, parallel: int = 4) -> bool:
        """Fetch everything else, and make it last on the disk; False if `close` came before the end."""
        jobs = [
            partial(self._once, (name, ordinal), partial(self._fill_chunk, file, ordinal))
            for name, file in self._files.items()
            for ordinal in range(len(file.stream.chunks))
        ]
        self._all(parallel, jobs)
        if self._stopped.is_set():
            return False
        self._once("sync", self._sync)
        self.progress.finished = True
        return True

    def _all(self, parallel: int, jobs: Sequence[Callable[[], None]]) -> None:
        def run(job: Callable[[], None]) -> None:
            try:
                if not self._stopped.is_set():
                    job()
            except StoreError:
                if not self._stopped.is_set():
                    raise

        with large_buffers_kept(), ThreadPoolExecutor(parallel, thread_name_prefix="pages") as pool:
            futures = [pool.submit(run, job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _once(self, key: object, work: Callable[[], None]) -> None:
        """Do `work` unless another thread is at the same; then wait for that one and share its outcome."""
        with self._landed:
            if self._stopped.is_set():
                raise StoreError(f"{self.directory} was closed while its pages were still coming")
            flight = self._flights.get(key)
            if flight is None:
                mine = self._flights[key] = Future()
        if flight is not None:
            flight.result()
            return
        try:
            work()
            mine.set_result(None)
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._landed:
                del self._flights[key]
                self._landed.notify_all()

    def _sync(self) -> None:
        for file in self._files.values():
            os.fsync(file.fd)

    def _fill_chunk(self, file: _File, ordinal: int) -> None:
        self._fetch_chunk(file, ordinal)
        if ordinal % _WRITE_EVERY == _WRITE_EVERY - 1:
            start_writing(file.fd)

    def _fetch_chunk(self, file: _File, ordinal: int) -> None:
        ref = file.stream.chunks[ordinal]
        if file.has(ordinal) or file.find_on_disk(ordinal, lambda pages: self._chunks.id(pages) == ref.id):
            return
        try:
            pages = self._chunks.get(ref.id, ref.pages)
        except Untrusted as error:
            log.warning("%s; fetching it again past all caches", error)
            pages = self._chunks.get(ref.id, ref.pages, fresh=True)
        file.write(ordinal, pages)
        self.progress.add(len(pages), ref.stored)
        faults.point("fetch.chunk")

    def _prefetch_part(self, part: int) -> None:
        assert self.working_set is not None
        if any(
            self._files[run.stream].missing(run.first, run.pages) >= 0 for run in self.working_set.runs(part)
        ):
            self._once(part, lambda: self._fetch_part(part))

    def _fetch_part(self, part: int) -> None:
        """A part that cannot be had is left out: chunks have its pages too, and are verified by themselves."""
        assert self.working_set is not None
        if self._find_part_on_disk(part):
            return
        try:
            pages = memoryview(self.working_set.fetch(part))
        except StoreError as error:
            log.warning("working set %d: %s; its pages come from chunks", self.working_set.number, error)
            self._bad_parts.add(part)
            return
        at = 0
        for run in self.working_set.runs(part):
            size = run.pages * PAGE
            self._files[run.stream].write_run(run.first, pages[at : at + size])
            at += size

    def _find_part_on_disk(self, part: int) -> bool:
        """Did another process, or this node before a restart, fetch this part?"""
        assert self.working_set is not None
        runs = [(self._files[run.stream], run.first, run.pages) for run in self.working_set.runs(part)]
        for file, first, count in reversed(runs):
            if (page := file.missing(first, count)) >= 0 and file.read(page, 1) == _ZERO:
                return False
        digest = blake3()
        for file, first, count in runs:
            digest.update(file.read(first, count))
        if digest.hexdigest() != self.working_set.parts[part].pages_blake3:
            return False
        for file, first, count in runs:
            file.mark(first, count)
        return True

    def _part_of(self, stream: str, page: int) -> int | None:
        firsts, runs = self._parts.get(stream, ([], []))
        at = bisect_right(firsts, page) - 1
        if at < 0:
            return None
        end, part = runs[at]
        return part if page < end and part not in self._bad_parts else None


class _File:
    """One sparse page image, with a byte for each page that says whether it is known to be right."""

    def __init__(self, path: Path, stream: Stream) -> None:
        self.path = path
        self.stream = stream
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self.fd).st_size != stream.size:
            os.ftruncate(self.fd, stream.size)
        self._present = bytearray(b"\1") * stream.pages
        for first, count in stream.data_runs():
            self._present[first : first + count] = bytes(count)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def missing(self, first: int, count: int) -> int:
        """The first page of these that is not present; -1 if all are."""
        return self._present.find(0, first, first + count)

    def has(self, ordinal: int) -> bool:
        return all(self.missing(extent.page, extent.pages) < 0 for extent in self.stream.extents(ordinal))

    def find_on_disk(self, ordinal: int, is_right: Callable[[bytes], bool]) -> bool:
        """Is the chunk in the file already, from another process or before a restart?"""
        extents = list(self.stream.extents(ordinal))
        if self.read(extents[-1].page, 1) == _ZERO:
            return False  # stored pages are never zero: this one has not come
        pages = b"".join(self.read(extent.page, extent.pages) for extent in extents)
        if not is_right(pages):
            return False
        for extent in extents:
            self.mark(extent.page, extent.pages)
        return True

    def read(self, first: int, count: int) -> bytes:
        """What lies on the disk, right or not, padded to whole pages."""
        return os.pread(self.fd, count * PAGE, first * PAGE).ljust(count * PAGE, b"\0")

    def write(self, ordinal: int, pages: bytes | memoryview) -> None:
        view = memoryview(pages)
        for extent in self.stream.extents(ordinal):
            self.write_run(extent.page, view[extent.within * PAGE : (extent.within + extent.pages) * PAGE])

    def write_run(self, first: int, pages: memoryview) -> None:
        """Put verified pages into the file and call them present; those that are present already are left alone."""
        at, end = 0, len(pages) // PAGE
        while (missing := self._present.find(0, first + at, first + end)) >= 0:
            at = missing - first
            stop = self._present.find(1, missing, first + end)
            until = end if stop < 0 else stop - first
            self._write(missing * PAGE, pages[at * PAGE : until * PAGE])
            self.mark(missing, until - at)
            at = until

    def _write(self, offset: int, data: memoryview) -> None:
        data = data[: self.stream.size - offset]  # the padding of the last page is not in the file
        while data:
            written = os.pwrite(self.fd, data, offset)
            data, offset = data[written:], offset + written

    def mark(self, first: int, count: int) -> None:
        """Call these pages present: the caller has verified them."""
        self._present[first : first + count] = b"\1" * count


def _parts_by_page(working_set: WorkingSet) -> dict[str, tuple[list[int], list[tuple[int, int]]]]:
    """Stream -> the sorted first pages of its runs, and (end, part) of each."""
    found: dict[str, list[tuple[int, int, int]]] = {}
    for part in range(len(working_set.parts)):
        for run in working_set.runs(part):
            found.setdefault(run.stream, []).append((run.first, run.first + run.pages, part))
    return {
        stream: ([first for first, _, _ in sorted(runs)], [(end, part) for _, end, part in sorted(runs)])
        for stream, runs in found.items()
    }
