"""The threads that bring pages in without being asked: the replay of the working set, and the fill.

Both give way: a copy holds the gate for one step only, a step is small while faults come, and the fill
sleeps as long as it worked. Neither decides anything about correctness; that is AddressSpace's.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from relume.pager import room, working_set
from relume.pager.ranges import Range
from relume.pager.source import PageSource
from relume.pager.space import AddressSpace, Served
from relume.pager.working_set import Piece

STEP_BYTES = 2 << 20
SMALL_STEP_BYTES = 256 << 10
"""What is copied in one go; the small one while faults come: a fault waits for the step under way."""

FAULT_SECONDS = 0.003
"""How long after a fault more are expected."""

_RETRIES = 200
_RETRY_SECONDS = 0.0005
_FILL_AHEAD_BYTES = 16 << 20
_ROOM_SECONDS = 0.05
_NO_ROOM_SECONDS = 1.0
_FILL_NICE = 5


class Pace:
    """When the last fault came; tells the others how large a step may be."""

    def __init__(self) -> None:
        self._last = 0.0

    def fault(self) -> None:
        self._last = time.monotonic()

    @property
    def quiet(self) -> bool:
        return time.monotonic() - self._last > FAULT_SECONDS

    @property
    def step(self) -> int:
        return STEP_BYTES if self.quiet else SMALL_STEP_BYTES


class Replay:
    """Brings the blocks of a working set in, in order, from several threads.

    ``prefetch`` reads ahead of need from the disk as soon as it is started; ``start`` begins the copying, to be
    called when CRIU is done (before that the memory is not registered, and copies answer ENOENT).
    """

    def __init__(
        self,
        blocks: list[list[Piece]],
        kept_back: range,
        threads: int,
        pace: Pace,
        done: Callable[[Replay], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.kept_back = tuple(piece for number in kept_back for piece in blocks[number])
        self.blocks = [block for number, block in enumerate(blocks) if number not in kept_back]
        self.copied = 0
        self.seconds = 0.0
        self.finished = False
        self._queue = deque(self.blocks)
        self._threads = threads
        self._pace = pace
        self._done = done
        self._failed = failed
        self._lock = threading.Lock()
        self._running = 0
        self._began = 0.0

    def prefetch(self, sources: Mapping[int, PageSource]) -> None:
        """Starts reading what the page cache lacks, in the order of the replay. ``sources`` by pages_id."""
        self._spawn("prefetch", lambda: self._prefetch(sources))

    def start(self, spaces: dict[int, AddressSpace]) -> None:
        """Starts the threads. ``spaces`` by pages_id."""
        self._began = time.monotonic()
        self._running = self._threads
        for number in range(self._threads):
            self._spawn(f"replay-{number}", lambda: self._work(spaces))

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failed(error)

        threading.Thread(target=run, name=name, daemon=True).start()

    def _prefetch(self, sources: Mapping[int, PageSource]) -> None:
        for block in self.blocks:
            for piece in block:
                source = sources.get(piece.pages_id)
                if source and not source.ready(piece.offset, piece.length):
                    source.prefetch(piece.offset, piece.length)

    def _work(self, spaces: dict[int, AddressSpace]) -> None:
        copied = 0
        while True:
            try:
                block = self._queue.popleft()
            except IndexError:
                break
            for piece in block:
                if (space := spaces.get(piece.pages_id)) and not space.dead:
                    for part in space.locate(piece.offset, piece.length):
                        copied += bring(space, part, self._pace)
        with self._lock:
            self.copied += copied
            self._running -= 1
            last = self._running == 0
        if last:
            self.seconds = time.monotonic() - self._began
            self.finished = True
            self._done(self)


def bring(space: AddressSpace, wanted: Range, pace: Pace) -> int:
    """Copies ``wanted`` in steps, as far as it is pending; returns the bytes. Gives up where the layout keeps changing."""
    copied = 0
    position = wanted.start
    retries = 0
    while position < wanted.end and not space.dead:
        part = wanted.cut(position, position + pace.step)
        outcome, done = space.bring(part)
        copied += done
        if outcome is Served.LATER and retries < _RETRIES:
            retries += 1
            time.sleep(_RETRY_SECONDS)
            continue
        position = part.end
    return copied


class Fill:
    """Brings everything else in, process by process, in order of address, from one thread."""

    def __init__(
        self,
        group: str | None,
        pace: Pace,
        changed: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._group = group
        self._pace = pace
        self._changed = changed
        self._failed = failed
        self._room = 0
        self._asked = 0.0
        self._nudge = threading.Event()
        self.waited_for_room = 0.0

    def start(self, spaces: Callable[[], list[AddressSpace]]) -> None:
        """Fills whatever is pending; ``spaces`` gives the processes of the moment."""

        def run() -> None:
            try:
                # Of this thread alone (setpriority(2): on Linux a nice value is a thread's).
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _FILL_NICE)
                while True:
                    self._nudge.clear()
                    while any([self._fill(space) for space in spaces()]):
                        pass
                    self._nudge.wait()
            except BaseException as error:
                self._failed(error)

        threading.Thread(target=run, name="fill", daemon=True).start()

    def nudge(self) -> None:
        """A process was forked: look again."""
        self._nudge.set()

    def _fill(self, space: AddressSpace) -> bool:
        """One pass over a process; False when it lacked nothing."""
        if space.dead or not space.pending.total:
            self._changed()
            return False
        for part in self._parts(space):
            self._wait_for_room(part.length)
            began = time.monotonic()
            outcome, done = space.bring(part)
            took = time.monotonic() - began
            self._room -= done
            space.counters.filled_bytes += done
            if outcome is Served.GONE:
                break
            # Half of one processor at most; while faults come a pause is longer than serving one takes.
            time.sleep(took if self._pace.quiet else max(took, FAULT_SECONDS))
        self._changed()
        return True

    def _parts(self, space: AddressSpace) -> Iterator[Range]:
        position = 0
        ahead = 0
        while (following := space.next_pending(position)) is not None:
            part = following.cut(following.start, following.start + self._pace.step)
            if part.offset >= ahead or part.offset < ahead - 2 * _FILL_AHEAD_BYTES:
                space.source.prefetch(part.offset, _FILL_AHEAD_BYTES)
                ahead = part.offset + _FILL_AHEAD_BYTES
            yield part
            position = part.end

    def _wait_for_room(self, length: int) -> None:
        while True:
            now = time.monotonic()
            if self._room < length or now - self._asked > _ROOM_SECONDS:
                self._room = room.available(self._group)
                self._asked = now
            if self._room >= length:
                return
            self.waited_for_room += _NO_ROOM_SECONDS
            time.sleep(_NO_ROOM_SECONDS)


def blocks_of(learned: working_set.WorkingSet) -> tuple[list[list[Piece]], range]:
    """The blocks to replay and the numbers of those that this turn keeps back."""
    blocks = working_set.plan(learned.pieces)
    return blocks, working_set.withheld(len(blocks), learned.turn)


def total(blocks: list[list[Piece]]) -> int:
    """Bytes in ``blocks``."""
    return sum(piece.length for piece in itertools.chain.from_iterable(blocks))
