"""Where pages come from. A local file now; chunks from a store later, behind the same Protocol.

The file is mapped, so that UFFDIO_COPY copies straight out of the page cache, which all restores on the
machine share. A mapping reads its file by faults, and those fail by signal: so pages are brought in by
MADV_POPULATE_READ first, which answers an I/O error or a file that was cut short with EFAULT instead.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from pathlib import Path
from typing import Protocol

from relume.errors import ImageError, PagerError
from relume.images.integrity import BLOCK_BYTES, PagesVerifier
from relume.linux import memory, syscall

_MADV_POPULATE_READ = 22
_MAP_NORESERVE = 0x4000
MEMORY_PATIENCE_SECONDS = 5.0
"""How long memory may be short, for the contents or for the app's own pages, before that is the end."""

_MEMORY_RETRY_SECONDS = 0.01


class PageSource(Protocol):
    """The contents of one process's pages file. Offsets and lengths in bytes, whole pages. Thread-safe."""

    def ready(self, offset: int, length: int) -> bool:
        """Whether :meth:`load` would return at once: in memory, and verified where that is asked for."""

    def prefetch(self, offset: int, length: int) -> None:
        """Begins to bring the bytes in, in the order of the calls. A hint: never fails, returns soon."""

    def load(self, offset: int, length: int) -> int:
        """Waits until the bytes are here and verified; returns their address in this process.

        Raises ImageError when they cannot be had, Untrusted when they are not what was dumped, PagerError when memory
        for them stays short.
        """

    def close(self) -> None:
        """Unmaps. No address that was handed out may be used after it."""


class NoPages:
    """The source of a process without lazy pages: nobody ever asks it."""

    def ready(self, offset: int, length: int) -> bool:
        return True

    def prefetch(self, offset: int, length: int) -> None:
        pass

    def load(self, offset: int, length: int) -> int:
        raise ImageError(
            f"{length} bytes at {offset:#x} of a process without lazy pages", hint="a bug; report it"
        )

    def close(self) -> None:
        pass


class FileSource:
    """A ``pages-*.img`` on a local disk. With ``verifier``, no byte leaves before its block was checked."""

    def __init__(self, path: Path, verifier: PagesVerifier | None = None) -> None:
        """Raises ImageError."""
        self.path = path
        self._verifier = verifier
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
            # Never written to; private and writable only because ctypes gives no address of a read-only one.
            self._map = mmap.mmap(
                self._descriptor,
                self.size,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}", hint="take a new checkpoint") from error
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        self._content = memoryview(self._map)
        self._loaded = bytearray(self.size // BLOCK_BYTES + 1)
        """Blocks that were brought in, and verified where that is asked for."""
        self._left = bytearray(len(self._loaded))
        """Blocks of which something was seen to have left memory since."""

    @property
    def hashed_bytes(self) -> int:
        """How much was hashed by us; 0 where all was verified before, or is not to be."""
        return self._verifier.hashed_bytes if self._verifier else 0

    def ready(self, offset: int, length: int) -> bool:
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        if self._verifier and 0 in self._loaded[first : last + 1]:
            if not self._verifier.known(offset, length):
                return False
            offset = first * BLOCK_BYTES  # load() brings whole blocks then
            length = min((last + 1) * BLOCK_BYTES, self.size) - offset
        if memory.resident(self._address + offset, length):
            return True
        self._left[first : last + 1] = b"\1" * (last + 1 - first)  # load() is to look again
        return False

    def prefetch(self, offset: int, length: int) -> None:
        try:
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # no read-ahead on this file system; load() reads then

    def load(self, offset: int, length: int) -> int:
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        if 0 in self._loaded[first : last + 1]:
            if self._verifier:
                self._load_verified(first, last)
            else:
                self._populate(offset, length)
                for block in range(-(-offset // BLOCK_BYTES), (offset + length) // BLOCK_BYTES):
                    self._loaded[block] = 1
        if 1 in self._left[first : last + 1]:
            self._left[first : last + 1] = bytes(last + 1 - first)
            self._populate(offset, length)
        return self._address + offset

    def close(self) -> None:
        self._content.release()
        del self._anchor
        self._map.close()
        os.close(self._descriptor)
        if self._verifier:
            self._verifier.close()

    def _load_verified(self, first: int, last: int) -> None:
        assert self._verifier is not None
        for block in range(first, last + 1):
            if self._loaded[block]:
                continue
            start = block * BLOCK_BYTES
            length = min(BLOCK_BYTES, self.size - start)
            self._populate(start, length)
            self._verifier.check(self._content, start, length)
            self._loaded[block] = 1

    def _populate(self, offset: int, length: int) -> None:
        libc = syscall.libc()
        patience = 0.0
        while (
            libc.madvise(
                ctypes.c_void_p(self._address + offset),
                ctypes.c_size_t(length),
                ctypes.c_int(_MADV_POPULATE_READ),
            )
            != 0
        ):
            error = syscall.error(str(self.path))
            if error.errno in (errno.EINTR, errno.EAGAIN):
                continue
            if error.errno == errno.EINVAL:
                return  # before Linux 5.14; the copy brings the pages in by itself
            if error.errno == errno.ENOMEM:
                # No room for the page cache, or for page tables: the file is not to blame.
                now = time.monotonic()
                patience = patience or now + MEMORY_PATIENCE_SECONDS
                if now < patience:
                    time.sleep(_MEMORY_RETRY_SECONDS)
                    continue
                raise PagerError(
                    f"{self.path}: no memory to read {length} bytes at {offset:#x}",
                    hint="see the kernel's log; the instance was killed, it must not run on without them",
                )
            raise ImageError(
                f"{self.path}: {length} bytes at {offset:#x} cannot be read ({error.strerror})",
                hint="the disk fails or the file was cut short; take a new checkpoint",
            )
