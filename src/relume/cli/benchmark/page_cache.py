"""The page cache of a checkpoint's images: warm, or dropped as after a reboot."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 2 << 20
_SAMPLE = 1 << 30
_ROUNDS = 3
_WRITTEN = 512 << 20


@dataclass(frozen=True, slots=True)
class WriteLimits:
    """What a dump cannot be faster than on this machine, in bytes per second."""

    memory: float
    """Copied into the page cache."""
    disk: float
    """Until it is on the disk."""


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


@functools.cache
def write_limits(directory: Path) -> WriteLimits:
    """Measured once, with a file of 512 MiB in ``directory``, which is removed again: the fastest of three rounds.

    A limit is what can be reached; the first pages of a virtual machine that was idle can cost its host a fault each.
    """
    block = os.urandom(_CHUNK)
    rounds = [_write(directory, block) for _ in range(_ROUNDS)]
    copied, done = (min(seconds) for seconds in zip(*rounds, strict=True))
    return WriteLimits(_WRITTEN / copied, _WRITTEN / done)


def _write(directory: Path, block: bytes) -> tuple[float, float]:
    """Seconds until all is in the page cache, and on the disk."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        began = time.monotonic()
        for _ in range(_WRITTEN // _CHUNK):
            file.write(block)
        copied = time.monotonic()
        os.fdatasync(file.fileno())
        return copied - began, time.monotonic() - began


def _images(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_file()]


def _read(path: Path, size: int) -> None:
    buffer = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while done < size and (got := file.readinto(buffer)):
            done += got
