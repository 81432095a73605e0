"""Keeps glibc from giving every chunk's buffer back to the kernel.

Buffers of a megabyte are above malloc's limit for `mmap`, so each would be mapped, faulted in page by page and
unmapped again, under one lock for all threads: measured (bench/store.py), a third of the time of a download. While a
transfer goes on they stay on the heap; afterwards the heap is trimmed. Source: mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT = 32 << 20  # the largest M_MMAP_THRESHOLD that glibc takes


@contextmanager
def large_buffers_kept() -> Iterator[None]:
    """For the length of one upload or download. Does nothing with another libc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
    libc.mallopt(_M_TRIM_THRESHOLD, 4 * _KEPT)
    try:
        yield
    finally:
        libc.malloc_trim(0)
