"""Uploading streams as chunks: several requests in flight, bounded memory, a limit on bandwidth, resumable.

One thread reads and cuts; a few others hash, compress, encrypt and send (all of that leaves the GIL). What the
store has already is neither compressed nor sent, which is also how an upload goes on after its node died:
the same pages give the same chunks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from relume.store._malloc import large_buffers_kept
from relume.store.chunks import PAGE, Chunks, Splitter
from relume.store.index import ChunkRef, Stream


@dataclass(frozen=True, slots=True)
class Limits:
    """`parallel` requests in flight; `bytes_per_second` for what is sent (None: as fast as it goes).

    Memory is at most about 3 chunks (12 MiB) for each request in flight, plus what reads ahead of them.
    """

    parallel: int = 8
    bytes_per_second: int | None = None


@dataclass(slots=True)
class Progress:
    """How far an upload or download is, in bytes; safe to read from other threads at any time."""

    total: int = 0
    done: int = 0
    sent: int = 0
    finished: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, done: int, sent: int = 0) -> None:
        with self._lock:
            self.done += done
            self.sent += sent

    def __str__(self) -> str:
        percent = 100 * self.done // self.total if self.total else 100
        return f"{min(percent, 100)} % of {self.total / 1e6:.0f} MB, {self.sent / 1e6:.0f} MB sent"


class Throttle:
    """Lets `bytes_per_second` through on average, over all threads, with at most `burst_s` seconds' worth at once."""

    def __init__(
        self,
        bytes_per_second: int | None,
        *,
        burst_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = bytes_per_second
        self._burst_s = burst_s
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until `count` bytes may be sent."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - self._burst_s)
            self._free_at = begin + count / self._rate
        if begin > now:
            self._sleep(begin - now)


@dataclass(frozen=True, slots=True)
class Uploaded:
    streams: tuple[Stream, ...]
    data: int
    stored: int
    new_stored: int


def upload_streams(
    chunks: Chunks,
    sources: Iterable[tuple[str, Path]],
    *,
    limits: Limits,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
    mend: bool = False,
) -> Uploaded:
    """Bring every page of `sources` (stream name, file) into the store and say where it is.

    `check` is called before each chunk, to end a superseded upload by raising. With `mend` what the store has is
    sent all the same, in its place: some of it is damaged. Raises StoreError, OSError.
    """
    uploader = _Uploader(chunks, limits, progress, check, {} if mend else chunks.present())
    with large_buffers_kept(), ThreadPoolExecutor(limits.parallel, thread_name_prefix="upload") as pool:
        streams = []
        for name, path in sources:
            with path.open("rb") as file:
                streams.append(uploader.stream(pool, name, file))
    refs = {ref.id: ref for stream in streams for ref in stream.chunks}
    return Uploaded(
        tuple(streams),
        data=sum(ref.pages for stream in streams for ref in stream.chunks) * PAGE,
        stored=sum(ref.stored for ref in refs.values()),
        new_stored=uploader.new_stored,
    )


class _Uploader:
    def __init__(
        self,
        chunks: Chunks,
        limits: Limits,
        progress: Progress,
        check: Callable[[], None],
        present: Mapping[bytes, int],
    ) -> None:
        self.new_stored = 0
        self._chunks = chunks
        self._progress = progress
        self._check = check
        self._throttle = Throttle(limits.bytes_per_second)
        self._room = threading.BoundedSemaphore(limits.parallel + 2)
        self._known: dict[bytes, int | Future[int]] = dict(present)
        self._lock = threading.Lock()
        self._failed = False

    def stream(self, pool: ThreadPoolExecutor, name: str, file: BinaryIO) -> Stream:
        splitter = Splitter(file, self._chunks.tenant.cut)
        pending: list[Future[ChunkRef]] = []
        try:
            for pages in splitter:
                self._check()
                self._room.acquire()
                future = pool.submit(self._one, pages)
                future.add_done_callback(lambda _: self._room.release())
                pending.append(future)
                if self._failed:
                    break  # the results below raise what it was
            refs = tuple(future.result() for future in pending)
        except BaseException:
            for future in pending:
                future.cancel()
            raise
        return Stream(name, splitter.size, tuple(splitter.runs), refs)

    def _one(self, pages: bytes) -> ChunkRef:
        chunk_id = self._chunks.id(pages)
        count = len(pages) // PAGE
        with self._lock:
            known = self._known.get(chunk_id)
            if known is None:
                mine: Future[int] = Future()
                self._known[chunk_id] = mine
        if known is not None:  # in the store, or on its way in another thread
            stored = known if isinstance(known, int) else known.result()
            self._progress.add(len(pages))
            return ChunkRef(chunk_id, count, stored)
        try:
            sealed = self._chunks.seal(chunk_id, pages)
            self._throttle.take(len(sealed))
            self._chunks.store(chunk_id, sealed)
        except BaseException as error:
            self._failed = True
            mine.set_exception(error)
            raise
        with self._lock:
            self.new_stored += len(sealed)
        mine.set_result(len(sealed))
        self._progress.add(len(pages), len(sealed))
        return ChunkRef(chunk_id, count, len(sealed))
