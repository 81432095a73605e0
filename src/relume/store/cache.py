"""The node's cache: checkpoints of the region on this node's disk, whole or partial, within a bound.

An entry is a directory that appears by rename when its small files are in place. Its page images are sparse
files with the layout of CRIU's own, which fill as pages come; a page is trusted only after its chunk's hash was
computed from what lies on the disk (`pages`), so a crash at any point, a power cut included, costs a second
fetch and never a wrong byte. A whole entry says so with the marker `complete`, written after fsync. The small files
of one that is not whole are trusted until the machine's next boot only (`boot`): they were not synced.

Eviction takes the entry that was used longest ago and that nobody pins. A pin is a shared flock on the entry's
file `pin`: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relume.errors import StoreError
from relume.linux.process import boot_id
from relume.store import faults

_PIN = "pin"
_COMPLETE = "complete"
_BOOT = "boot"


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached checkpoint: bytes on disk (holes do not count), `used_at` in seconds since 1970."""

    id: str
    directory: Path
    bytes: int
    complete: bool
    used_at: float


class Pin:
    """Keeps one entry from eviction until `close`, or the death of this process."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.directory = directory
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cache:
    """Safe to use from several threads and processes of one node at once."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Finish what a crash interrupted. Only at the node's start: half-made entries have no other mark."""
        for left in [*self.root.glob(".making-*"), *self.root.glob(".trash-*")]:
            shutil.rmtree(left, ignore_errors=True)

    def pin(self, entry_id: str) -> Pin | None:
        """Pin an entry and mark it as used now; None if it is not there."""
        directory = self.root / entry_id
        if not self._survived_boot(directory):
            self.evict(entry_id)
        try:
            fd = os.open(directory / _PIN, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        try:
            if (directory / _PIN).stat().st_ino == os.fstat(fd).st_ino:
                os.utime(fd)
                return Pin(directory, fd)
        except FileNotFoundError:
            pass  # evicted between open and flock
        os.close(fd)
        return None

    def add(self, entry_id: str, build: Callable[[Path], None]) -> Pin:
        """Make an entry with `build(directory)` and pin it; if somebody was faster, theirs is pinned."""
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=self.root))
        try:
            build(making)
            (making / _BOOT).touch(mode=0o600)
            (making / _BOOT).write_text(boot_id())
            (making / _PIN).touch(mode=0o600)
            faults.point("fetch.unpacked")
            try:
                making.rename(self.root / entry_id)
            except OSError:
                if not (self.root / entry_id).is_dir():
                    raise
            faults.point("fetch.entered")
        finally:
            shutil.rmtree(making, ignore_errors=True)
        pin = self.pin(entry_id)
        if pin is None:
            raise StoreError(
                f"{entry_id} was evicted while it was being fetched",
                hint="The cache is too small: [store] max_cache_bytes.",
            )
        return pin

    def is_complete(self, directory: Path) -> bool:
        return (directory / _COMPLETE).exists()

    def mark_complete(self, directory: Path) -> None:
        """Call an entry whole, whose pages were synced: from now on it needs no store, and outlives a power cut."""
        for folder, _, files in os.walk(directory):
            for path in (Path(folder), *(Path(folder, file) for file in files)):
                if path.is_dir() or (path.is_file() and not path.is_symlink()):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    os.fsync(fd)
                    os.close(fd)
        faults.point("fetch.complete")
        (directory / _COMPLETE).touch(mode=0o600)

    def _survived_boot(self, directory: Path) -> bool:
        try:
            return self.is_complete(directory) or (directory / _BOOT).read_text() == boot_id()
        except OSError:
            return False

    def entries(self) -> list[Entry]:
        """Every entry, the one used longest ago first."""
        found = []
        for directory in self.root.iterdir():
            try:
                if directory.is_dir() and not directory.name.startswith("."):
                    used_at = (directory / _PIN).stat().st_mtime
                    found.append(
                        Entry(
                            directory.name, directory, _usage(directory), self.is_complete(directory), used_at
                        )
                    )
            except FileNotFoundError:
                continue  # evicted meanwhile
        return sorted(found, key=lambda entry: entry.used_at)

    def make_room(self, needed: int) -> None:
        """Evict until `needed` more bytes fit the bound. Raises StoreError when what is pinned leaves no room."""
        with self._lock:
            entries = self.entries()
            used = sum(entry.bytes for entry in entries)
            for entry in entries:
                if used + needed <= self.limit_bytes:
                    return
                if self.evict(entry.id):
                    used -= entry.bytes
            if used + needed > self.limit_bytes:
                raise StoreError(
                    f"the cache has no room for {needed} bytes: {used} of {self.limit_bytes} are in use by instances",
                    hint="Raise [store] max_cache_bytes, or stop instances of other builds.",
                )

    def evict(self, entry_id: str) -> bool:
        """Remove an entry unless somebody pins it."""
        directory = self.root / entry_id
        try:
            fd = os.open(directory / _PIN, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            trash = Path(tempfile.mkdtemp(prefix=".trash-", dir=self.root))
            directory.rename(trash / "entry")
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            os.close(fd)
        faults.point("cache.evict")
        shutil.rmtree(trash, ignore_errors=True)
        return True


def _usage(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            try:
                total += os.lstat(os.path.join(folder, file)).st_blocks * 512  # noqa: PTH118 - hot, many files
            except FileNotFoundError:
                continue
    return total
