"""The log of one instance: raw bytes in one file, time stamps in another, rotation by size.

``log`` holds exactly what the app wrote, both streams in the order they arrived. ``log.times`` has a line
``OFFSET UNIX_TIME STREAM`` for each piece that was read, OFFSET being where it begins in ``log``. When either has
``limit`` bytes, both are renamed to ``.1`` (one generation is kept) at a line's end.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

STDOUT, STDERR, RELUME = "out", "err", "relume"


class Log:
    """An append-only log; writes go straight to the kernel, so that a reader sees them at once."""

    def __init__(self, path: Path, *, limit: int) -> None:
        """Go on with the log at ``path``, or begin it. Raises OSError."""
        self._path = path
        self._limit = limit
        self._raw, self._times = _opened(path), _opened(times_of(path))
        self._size = os.fstat(self._raw).st_size
        self._stamped = os.fstat(self._times).st_size

    def write(self, data: bytes, stream: str) -> None:
        """Append ``data``, all of it. Never raises OSError: a full disk loses it, since the app must not stand
        still for its log."""
        if max(self._size, self._stamped) >= self._limit and data:
            data = self._rotate(data, stream)
        self._append(data, stream)

    def _append(self, data: bytes, stream: str) -> None:
        if not data:
            return
        try:
            stamp = f"{self._size} {time.time():.6f} {stream}\n".encode()
            self._stamped += os.write(self._times, stamp)
            rest = memoryview(data)
            while rest:
                written = os.write(self._raw, rest)
                self._size += written
                rest = rest[written:]
        except OSError:
            pass

    def _rotate(self, data: bytes, stream: str) -> bytes:
        """Finish the line that is being written, rename both files; returns what belongs to the new one."""
        end = data.find(b"\n") + 1
        if not end and max(self._size, self._stamped) < 2 * self._limit:
            return data  # in the middle of a long line: let it grow a little
        self._append(data[:end], stream)
        paths = (self._path, times_of(self._path))
        fresh: list[int] = []
        try:
            for path in paths:
                fresh.append(_opened(_beside(path, ".new"), os.O_TRUNC))  # noqa: PERF401 - to close what there is
            for path in paths:
                with contextlib.suppress(FileNotFoundError):  # somebody removed it
                    path.replace(_beside(path, ".1"))
                _beside(path, ".new").replace(path)
        except OSError:  # no room for another file: go on in the old one
            for descriptor in fresh:
                os.close(descriptor)
            return data[end:]
        self.close()
        self._raw, self._times = fresh
        self._size = self._stamped = 0
        return data[end:]

    def close(self) -> None:
        os.close(self._raw)
        os.close(self._times)


def times_of(path: Path) -> Path:
    """Where the time stamps of the log at ``path`` are."""
    return path.with_name(path.name + ".times")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _opened(path: Path, more: int = 0) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | more, 0o600)
