"""All memory of some processes, before anybody asks for it: what a device driver needs that pins pages.

A driver that pins user memory calls get_user_pages with the mmap lock held. Such a call cannot wait for a
userfaultfd: the kernel answers EFAULT on a page that is still to come, and also on one that was never there, as long
as its mapping is registered (handle_userfault in fs/userfaultfd.c without FAULT_FLAG_ALLOW_RETRY; NVIDIA's
os_lock_user_pages is such a caller). So these processes get everything, in large pieces, in the order of the file
and from several threads, and their userfaultfds are closed before the driver is asked for anything.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

from relume.pager.background import STEP_BYTES, Pace, bring
from relume.pager.ranges import Range
from relume.pager.source import PageSource
from relume.pager.space import AddressSpace

_AHEAD_BYTES = 32 << 20
_RETRY_SECONDS = 0.001


class Whole:
    """Brings in the processes of ``sources``, each from ``threads`` threads.

    ``changed`` is told when a process has been worked through, ``failed`` of any error.
    """

    def __init__(
        self,
        sources: Mapping[int, tuple[PageSource, list[Range]]],
        threads: int,
        pace: Pace,
        changed: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """``sources``: pid in the image -> its pages file, and what of it is to come."""
        self._pace = pace
        self._changed = changed
        self._failed = failed
        self._threads = threads
        self._parts = {
            pid: deque(_parts(sorted(ranges, key=lambda each: each.offset)))
            for pid, (_, ranges) in sources.items()
        }
        self._lock = threading.Lock()
        self._first = 0.0
        self.spaces: list[AddressSpace] = []
        self.told = False
        self.copied = 0
        self.seconds = 0.0
        """From the first page that could be given to the last."""
        for pid, (source, _) in sources.items():
            self._spawn(partial(self._load, source, list(self._parts[pid])))

    def start(self, pid: int, space: AddressSpace) -> None:
        """CRIU has named ``pid``: its memory is ``space``. Memory takes pages from its registration on."""
        self.spaces.append(space)
        for _ in range(self._threads):
            self._spawn(partial(self._copy, self._parts[pid], space))

    def _spawn(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failed(error)

        threading.Thread(target=run, name="whole", daemon=True).start()

    def _load(self, source: PageSource, parts: list[Range]) -> None:
        """Reads and verifies ahead of the copying, while CRIU still makes the processes."""
        asked = 0
        for part in parts:
            if part.offset >= asked:
                source.prefetch(part.offset, _AHEAD_BYTES)
                asked = part.offset + _AHEAD_BYTES
            source.load(part.offset, part.length)

    def _copy(self, parts: deque[Range], space: AddressSpace) -> None:
        while not space.dead:
            try:
                part: Range | None = parts.popleft()
            except IndexError:
                # What was moved meanwhile, or kept changing, is where the process says it is.
                part = space.next_pending(0)
            if part is None:
                if not space.lacking:
                    break
                time.sleep(_RETRY_SECONDS)  # somebody else copies the last of it, and may fail to
                continue
            done = bring(space, [part], self._pace)
            if not done:
                time.sleep(_RETRY_SECONDS)
                continue
            with self._lock:
                now = time.monotonic()
                self._first = self._first or now
                self.copied += done
                self.seconds = now - self._first
        self._changed()


def _parts(ranges: list[Range]) -> list[Range]:
    """``ranges`` in pieces of 2 MiB at most, cut where the pages file's blocks end."""
    parts = []
    for each in ranges:
        offset = each.offset
        while offset < each.offset + each.length:
            end = min((offset // STEP_BYTES + 1) * STEP_BYTES, each.offset + each.length)
            parts.append(each.cut(each.start + offset - each.offset, each.start + end - each.offset))
            offset = end
    return parts
