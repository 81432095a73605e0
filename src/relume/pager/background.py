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
from collections.abc import Callable, Iterable, Iterator, Mapping

from relume.pager import room, working_set
from relume.pager.ranges import Range
from relume.pager.source import PageSource
from relume.pager.space import AddressSpace, Served
from relume.pager.working_set import BLOCK_BYTES, Piece

STEP_BYTES = 2 << 20
SMALL_STEP_BYTES = 1 << 20
POLITE_STEP_BYTES = 256 << 10
"""What is copied in one go: in quiet times, by the replay while faults come, and by the fill then.

A fault waits for the step under way; but each step costs as much in Python as copying 200 KiB, and a replay that is too
polite is what the app waits for: with steps of 256 KiB the answer of bench/workloads/model took 70 % longer.
"""

FAULT_SECONDS = 0.003
"""How long after a fault more are expected."""

_READS_AHEAD = 16
_READS_AHEAD_OF_CRIU = 3
"""Blocks asked of the disk before they are waited for, when it is ours alone and while CRIU needs it too."""

_RETRIES = 200
_RETRY_SECONDS = 0.0005
_FILL_AHEAD_BYTES = 16 << 20
_FILL_RANGES = 64
"""What one step of the fill has at most: a fault waits for it, and of small ones each takes longer than its copying."""

_FILL_LOOK_SECONDS = 1.0
"""Between the looks of a fill that has nothing to do: what others bring in and cannot give is to come again."""

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
        """Of the replay, in bytes."""
        return STEP_BYTES if self.quiet else SMALL_STEP_BYTES

    @property
    def polite_step(self) -> int:
        """Of the fill, in bytes."""
        return STEP_BYTES if self.quiet else POLITE_STEP_BYTES


class Replay:
    """Brings the blocks of a working set in, in order, from several threads.

    ``prepare`` maps, verifies and where need be reads the contents ahead of need: it takes the time that CRIU
    takes anyway. ``start`` begins the copying, to be called once the first process is known. Memory takes pages
    as soon as CRIU's restorer has registered it, which is some time before CRIU is done; until then copies
    answer ENOENT and are tried again.
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
        """From the first page that could be given to the last."""
        self.ahead = 0
        """Bytes given before CRIU was done."""
        self.finished = False
        self.all_named = False
        """To be set once CRIU is done: no more processes will come."""
        self._planned: dict[tuple[int, int], list[Piece]] = {}
        for piece in itertools.chain.from_iterable(self.blocks):
            self._planned.setdefault((piece.pages_id, piece.offset // BLOCK_BYTES), []).append(piece)
        self._queue = deque(self.blocks)
        self._threads = threads
        self._pace = pace
        self._done = done
        self._failed = failed
        self._lock = threading.Lock()
        self._started = False
        self._running = 0
        self._began = 0.0

    def prepare(self, sources: Mapping[int, PageSource]) -> None:
        """Starts mapping and reading, in the order of the replay. ``sources`` by pages_id."""
        self._spawn("prepare", lambda: self._load(sources))

    def start(self, space_of: Callable[[int], AddressSpace | None]) -> None:
        """Starts the threads; ``space_of`` gives the process of a pages_id, None while CRIU has not named it."""
        if self._started:
            return
        self._started = True
        self._running = self._threads
        for number in range(self._threads):
            self._spawn(f"replay-{number}", lambda: self._work(space_of))

    def planned(self, pages_id: int, offset: int) -> tuple[int, int] | None:
        """The bytes [start, end) of the file around ``offset`` that come in this replay, while it is under way."""
        if not self.finished:
            for piece in self._planned.get((pages_id, offset // BLOCK_BYTES), ()):
                if piece.offset <= offset < piece.offset + piece.length:
                    return piece.offset, piece.offset + piece.length
        return None

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failed(error)

        threading.Thread(target=run, name=name, daemon=True).start()

    def _load(self, sources: Mapping[int, PageSource]) -> None:
        pieces = [piece for piece in itertools.chain.from_iterable(self.blocks) if piece.pages_id in sources]
        ahead = 0
        for position, piece in enumerate(pieces):
            # While CRIU reads its images from the same disk, each of its small reads waits for what we queued.
            depth = _READS_AHEAD if self.all_named else _READS_AHEAD_OF_CRIU
            while ahead < min(position + depth, len(pieces)):
                sources[pieces[ahead].pages_id].prefetch(pieces[ahead].offset, pieces[ahead].length)
                ahead += 1
            if not self._queue:
                return  # the copying has caught up: it loads for itself
            sources[piece.pages_id].load(piece.offset, piece.length)

    def _work(self, space_of: Callable[[int], AddressSpace | None]) -> None:
        copied = ahead = 0
        while True:
            try:
                block = self._queue.popleft()
            except IndexError:
                break
            for pages_id, pieces in itertools.groupby(block, lambda piece: piece.pages_id):
                while (space := space_of(pages_id)) is None and not self.all_named:
                    time.sleep(_RETRY_SECONDS)
                if space is None or space.dead:
                    continue
                parts = [part for piece in pieces for part in space.locate(piece.offset, piece.length)]
                done = bring(space, parts, self._pace)
                copied += done
                ahead += 0 if space.restored else done
                if done and not self._began:
                    self._began = time.monotonic()
        with self._lock:
            self.copied += copied
            self.ahead += ahead
            self._running -= 1
            last = self._running == 0
        if last:
            self.seconds = time.monotonic() - self._began if self._began else 0.0
            self.finished = True
            self._done(self)


def bring(space: AddressSpace, wanted: Iterable[Range], pace: Pace) -> int:
    """Copies ``wanted`` in steps, as far as it is pending; returns the bytes copied.

    Leaves out what keeps changing: the fill, or a fault, brings that in.
    """
    copied = 0
    retries = 0
    rest = deque(wanted)
    while rest and not space.dead:
        step = _step(rest, pace.step)
        outcome, done = space.bring(step)
        copied += done
        if outcome is Served.LATER and retries < _RETRIES:
            retries += space.restored
            rest.extendleft(reversed(step))
            time.sleep(_RETRY_SECONDS)
    return copied


def _step(rest: deque[Range], size: int) -> list[Range]:
    """Takes ranges of ``size`` bytes together, at most, from the front of ``rest``."""
    taken: list[Range] = []
    while rest and size > 0:
        each = rest.popleft()
        if each.length > size:
            rest.appendleft(each.cut(each.start + size, each.end))
            each = each.cut(each.start, each.start + size)
        taken.append(each)
        size -= each.length
    return taken


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
                    while sum(self._fill(space) for space in spaces()):
                        pass
                    self._nudge.wait(_FILL_LOOK_SECONDS)
            except BaseException as error:
                self._failed(error)

        threading.Thread(target=run, name="fill", daemon=True).start()

    def nudge(self) -> None:
        """A process was forked: look again."""
        self._nudge.set()

    def _fill(self, space: AddressSpace) -> bool:
        """One pass over a process; False when it lacked nothing, and nobody was bringing in what may be refused."""
        if space.dead or not space.lacking:
            self._changed()
            return False
        if not space.pending.total:
            time.sleep(_RETRY_SECONDS)
        for step in self._steps(space):
            self._wait_for_room(sum(part.length for part in step))
            began = time.monotonic()
            outcome, done = space.bring(step)
            took = time.monotonic() - began
            self._room -= done
            space.counters.filled_bytes += done
            if outcome is Served.GONE:
                break
            if outcome is Served.LATER:
                time.sleep(_RETRY_SECONDS)  # whoever changes the layout needs the processor too
            # Half of one processor at most; while faults come a pause is longer than serving one takes.
            time.sleep(took if self._pace.quiet else max(took, FAULT_SECONDS))
        self._changed()
        return True

    def _steps(self, space: AddressSpace) -> Iterator[list[Range]]:
        """What is to come, in order of address, some ranges at a time: there may be very many small ones."""
        position = 0
        ahead = 0
        while True:
            step: list[Range] = []
            size = self._pace.polite_step
            while (
                size > 0
                and len(step) < _FILL_RANGES
                and (following := space.next_pending(position)) is not None
            ):
                part = following.cut(following.start, following.start + size)
                if part.offset >= ahead or part.offset < ahead - 2 * _FILL_AHEAD_BYTES:
                    space.source.prefetch(part.offset, _FILL_AHEAD_BYTES)
                    ahead = part.offset + _FILL_AHEAD_BYTES
                step.append(part)
                size -= part.length
                position = part.end
            if not step:
                return
            yield step

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
