"""A pager's page source (`relume.pager.source.PageSource`) over pages that come from the store.

The sparse page image is mapped shared, so that what `RemotePages` writes into the file is what UFFDIO_COPY
reads from the page cache, without another copy. `load` hands out an address only after every byte behind it was
verified.
"""

from __future__ import annotations

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor

from relume.errors import ImageError, StoreError, Untrusted
from relume.linux import memory
from relume.store.chunks import PAGE
from relume.store.pages import RemotePages
from relume.store.working_set import PageRun


class RemoteSource:
    """One `pages-N.img`. Offsets and lengths in bytes, whole pages; safe to use from many threads."""

    def __init__(self, pages: RemotePages, stream: str, *, parallel: int = 8) -> None:
        """Raises ImageError when the file cannot be mapped. `parallel` bounds what `prefetch` has in flight."""
        self._pages = pages
        self._stream = stream
        try:
            with pages.path(stream).open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            raise ImageError(f"{pages.path(stream)} cannot be mapped: {error}") from error
        self.size = len(self._map)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        self._ahead = ThreadPoolExecutor(parallel, thread_name_prefix=f"ahead {stream}")

    def ready(self, offset: int, length: int) -> bool:
        """Whether `load` would return at once: what came has not left memory since."""
        return self._present(offset, length) and memory.resident(self._address + offset, length)

    def prefetch(self, offset: int, length: int) -> None:
        """Begin to fetch, in the order of the calls. Never fails: `load` says what is wrong."""
        if not self._present(offset, length):
            self._ahead.submit(self._pages.ensure, self._stream, offset // PAGE, length // PAGE)

    def load(self, offset: int, length: int) -> int:
        """Wait until the bytes are here and verified; returns their address in this process.

        Raises Untrusted for bytes that are wrong even past all caches, and ImageError when they did not come within
        the store's `Patience`. Either way the instance must not run on.
        """
        try:
            self._pages.ensure(self._stream, offset // PAGE, length // PAGE)
            if not memory.resident(self._address + offset, length):
                # Read here, or the copy does it, while messages wait.
                self._pages.read(PageRun(self._stream, offset // PAGE, length // PAGE))
        except Untrusted:
            raise
        except (StoreError, OSError) as error:
            raise ImageError(
                f"{self._stream}: {length} bytes at {offset:#x} did not come: {error}"
            ) from error
        return self._address + offset

    def _present(self, offset: int, length: int) -> bool:
        return self._pages.present(self._stream, offset // PAGE, length // PAGE)

    def close(self) -> None:
        """Unmaps. No address that was handed out may be used after it."""
        self._ahead.shutdown(wait=True, cancel_futures=True)
        del self._anchor
        self._map.close()
