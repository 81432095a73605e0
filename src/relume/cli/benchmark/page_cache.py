"""The page cache of a checkpoint's images: warm, or dropped as after a reboot."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_CHUNK = 2 << 20
_SAMPLE = 1 << 30


def warm(directory: Path) -> None:
    """Read every image once."""
    for path in _images(directory):
        _read(path, path.stat().st_size)


def drop(directory: Path) -> None:
    """Drop the images from the page cache, and where the kernel lets us everything else that is clean.

    posix_fadvise(2) drops clean pages only, so what is dirty is written first.
    """
    for path in _images(directory):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):  # a container may not
        Path("/proc/sys/vm/drop_caches").write_text("1")


def sequential_speed(directory: Path) -> float:
    """Bytes per second of this disk, reading up to 1 GiB of the largest image in order."""
    largest = max(_images(directory), key=lambda path: path.stat().st_size)
    drop(directory)
    size = min(largest.stat().st_size, _SAMPLE)
    began = time.monotonic()
    _read(largest, size)
    return size / (time.monotonic() - began)


def _images(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_file()]


def _read(path: Path, size: int) -> None:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while done < size and (got := file.readinto(buffer)):
            done += got
