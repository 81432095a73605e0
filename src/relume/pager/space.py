"""The memory of one restored process: what it still lacks, and every rule about giving it that.

An AddressSpace belongs to one userfaultfd. Copies may be made from several threads; messages are read by
one thread (see gate.py for why these two exclude each other). docs/pager.md gives the rules with their
sources. The one that all others serve: a page is given contents from the image only while it is in
``pending``, and it is given zeros only while it is neither there nor being copied.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from relume.errors import PagerError
from relume.images.pagemap import PAGE_SIZE
from relume.linux import userfaultfd
from relume.linux.userfaultfd import Condition, Fault, Fork, Remap, Remove, Unmap
from relume.pager.gate import Gate
from relume.pager.ranges import Range, RangeMap
from relume.pager.source import MEMORY_PATIENCE_SECONDS, PageSource

log = logging.getLogger(__name__)

MINIMUM_WINDOW = 16 * PAGE_SIZE
MAXIMUM_WINDOW = 256 * PAGE_SIZE
"""Bytes brought in around a fault: the least, and the most where faults go upwards one after the other."""

_STREAMS = 16
"""Places of sequential access remembered per process."""

_ASKS = 64
"""How often the kernel is asked what is mapped while messages wait: for a millisecond at most."""

_MEMORY_PAUSE_SECONDS = 1.0
"""After what time without an attempt nobody has waited for memory."""

_SHORT = (errno.ENOMEM, errno.ENOSPC)


class Served(enum.Enum):
    """What became of an attempt to give pages."""

    DONE = enum.auto()
    LATER = enum.auto()
    """The layout is changing, or somebody else is copying there: try again once messages were read."""
    SLOW = enum.auto()
    """Nothing was tried: the source would have to be waited for (a disk, a hash, a store)."""
    GONE = enum.auto()
    """The memory no longer exists."""


@dataclass(slots=True)
class Counters:
    """What was done for one process; bytes, or how often."""

    faults: int = 0
    fault_bytes: int = 0
    zero_faults: int = 0
    replayed_bytes: int = 0
    filled_bytes: int = 0
    dropped_bytes: int = 0
    given_up_bytes: int = 0
    forks: int = 0
    again: int = 0

    def add(self, other: Counters) -> None:
        """Those of another process too."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True, eq=False)
class _Stream:
    """Where sequential faults are expected next, and how much to bring in then."""

    expected: int
    window: int


@dataclass(eq=False)
class AddressSpace:
    """``name`` for logs; ``layout`` has the image's order: offset in the pages file -> address at the dump.

    ``waiting`` are faults to be served by the loop, ``asked`` those given to a thread that may wait; ``doubtful`` is
    to come unless it was unmapped (see ``_unmap``).
    ``wiped`` are ranges that had MADV_WIPEONFORK at the dump: a child gets zeros there, not the contents.
    ``on_copy`` is told (pages_id, offset, length) of everything brought in by a fault; ``expected`` says which bytes
    of the pages file around (pages_id, offset) the replay means to bring in: what the app needs now or soon.
    """

    name: str
    descriptor: int
    pages_id: int
    pending: RangeMap
    layout: RangeMap
    source: PageSource
    wiped: RangeMap = field(default_factory=RangeMap)
    on_copy: Callable[[int, int, int], None] | None = None
    expected: Callable[[int, int], tuple[int, int] | None] | None = None
    restored: bool = True
    counters: Counters = field(default_factory=Counters)
    gate: Gate = field(default_factory=Gate)
    waiting: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    doubtful: list[Range] = field(default_factory=list)
    dead: bool = False
    generation: int = 0
    _flying: set[Range] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _streams: list[_Stream] = field(default_factory=list)
    _moved: RangeMap = field(default_factory=RangeMap)
    """Where something that is to come was moved to, since it was last seen that nothing is changing."""
    _changes: int = 0
    """How many messages other than faults were read."""
    _short_since: float = 0.0
    _short_at: float = 0.0
    """When memory was first and last found short, of attempts that followed each other."""

    @property
    def lacking(self) -> bool:
        """Whether something is to come, or being copied: that may be refused, and is to come again then.

        Once it is not, it never is again: a copy begins with what is to come, and a move does not make more of it.
        """
        with self._lock:
            return bool(self.pending.total or self._flying)

    @property
    def complete(self) -> bool:
        """Nothing is left to come, and nobody waits for anything. To be asked by the thread that reads messages."""
        if self.lacking or self.asked:
            return False
        # Asked after the others: a fault that is given back is put here before it is taken from there.
        return not self.waiting

    def locate(self, offset: int, length: int) -> list[Range]:
        """Where a piece of the pages file belongs in memory, unless the app moved it."""
        return [
            Range(address, address + end - start, start)
            for start, end, address in self.layout.overlap(offset, offset + length)
        ]

    def next_pending(self, address: int) -> Range | None:
        """The first range from ``address`` on that is still to come."""
        with self._lock:
            return self.pending.after(address)

    def probe(self) -> None:
        """Notices that the process ended or exec'd: nothing tells. For the thread that reads messages."""
        match userfaultfd.condition(self.descriptor):
            case Condition.GONE:
                self.dead = True
            case Condition.QUIET:
                self._seen_quiet()

    # --- messages (one thread) --------------------------------------------------------------------

    def read(self) -> list[AddressSpace]:
        """Reads what is queued and acts on all but the faults, which are put in ``waiting``.

        Returns the address spaces of processes that were forked. Raises OSError, PagerError.
        """
        born = []
        with self.gate.reading():
            if self._moved.total and userfaultfd.condition(self.descriptor) is not Condition.CHANGING:
                self._seen_quiet()
            messages = userfaultfd.read(self.descriptor)
            with self._lock:
                for message in messages:
                    match message:
                        case Fault(address):
                            self.waiting.add(address & -PAGE_SIZE)
                            continue
                        case Fork(descriptor):
                            born.append(self._fork(descriptor))
                        case Remap(source, destination, length):
                            self._remap(source, destination, length)
                        case Remove(start, end):
                            self._give_up(start, end)
                        case Unmap(start, end):
                            self._unmap(start, end)
                    self._changes += 1
        return born

    def _fork(self, descriptor: int) -> AddressSpace:
        """The child's memory is ours as it was at the fork: no copy was under way, none succeeded since."""
        self.counters.forks += 1
        self.generation += 1
        pending = self.pending.copy()
        for start, end, _ in self.wiped:
            pending.take(start, end)
        return AddressSpace(
            name=f"{self.name}+{self.generation}",
            descriptor=descriptor,
            pages_id=self.pages_id,
            pending=pending,
            layout=self.layout,
            source=self.source,
            wiped=self.wiped.copy(),
            on_copy=self.on_copy,
            doubtful=list(self.doubtful),
        )

    def _remap(self, source: int, destination: int, length: int) -> None:
        self.pending.move(source, destination, length)
        self.wiped.move(source, destination, length)
        self._moved.take(source, source + length)
        self._moved.take(destination, destination + length)
        if self.pending.overlap(destination, destination + length):
            self._moved.put(Range(destination, destination + length, destination))

    def _give_up(self, start: int, end: int) -> None:
        self.counters.given_up_bytes += sum(each.length for each in self.pending.take(start, end))

    def _unmap(self, start: int, end: int) -> None:
        """munmap(2) announces itself after it let go of the memory map's lock.

        So a range that another thread moved there meanwhile may be announced first (REMAP, then the UNMAP of what
        lay there before). Such a range keeps its contents. It can only be so if something was changing all the time
        between the two messages: the kernel counts the munmap from before it unmaps until its message was read.
        Where both were read before that could be asked, the range is kept, and asked about as soon as the kernel
        answers (``doubtful``): ENOENT drops it then.
        """
        for low, high in self._moved.gaps(start, end):
            self._give_up(low, high)
            self.wiped.take(low, high)
        for kept in self._moved.overlap(start, end):
            self.doubtful += self.pending.overlap(kept.start, kept.end)

    def _seen_quiet(self) -> None:
        """Nothing was changing a moment ago, and no message was read since: an UNMAP that comes is a later one.

        Said by a page that the kernel let us give, too: it refuses that while something is changing anywhere. For
        the thread that reads messages, or whoever holds ``gate.copying``: ``_moved`` gets more only under
        ``gate.reading``, so what it says now was read before that moment.
        """
        if self._moved.total:
            self._moved = RangeMap()

    @property
    def unsettled(self) -> bool:
        """Whether :meth:`settle` has something to ask, and is to be called again soon."""
        return not self.dead and bool(self.doubtful or self._moved.total)

    def settle(self) -> None:
        """Asks whether nothing is changing any more since a move, and whether what may have been unmapped is mapped.

        Forgets what is not. At once, whether or not the contents can be had: the less time passes, the less can come to
        lie in a place that was unmapped, and the earlier an UNMAP can only be a later one than the move. Where there is
        much to ask, messages are not to wait: the rest is asked next time. For the thread that reads them. Raises
        PagerError.
        """
        if self._moved.total:
            self.probe()
        asks = _ASKS
        while self.doubtful and asks and not self.dead:
            each = self.doubtful.pop()
            with self.gate.copying():
                decided, asks = self._drop_unmapped(each, asks)
            if decided < each.end:
                self.doubtful.append(each.cut(decided, each.end))
                return

    def _drop_unmapped(self, doubtful: Range, asks: int) -> tuple[int, int]:
        """Returns up to where it could be told, and how many of ``asks`` are left.

        Not further while something is changing, or being copied there.
        """
        position, step = doubtful.start, doubtful.length
        while position < doubtful.end and asks:
            asks -= 1
            step = min(step, doubtful.end - position)
            error = userfaultfd.ask(self.descriptor, position, step)
            if error == errno.ENOENT and step > PAGE_SIZE:
                step = PAGE_SIZE  # not within one mapping; and doubled as long as it is
                continue
            if error == errno.ENOENT:
                # Hardly a page is unmapped alone. Whether that is to be believed is asked once for all of them.
                while asks and position + step < doubtful.end:
                    asks -= 1
                    if userfaultfd.ask(self.descriptor, position + step, PAGE_SIZE) != errno.ENOENT:
                        break
                    step += PAGE_SIZE
            if error and not (error == errno.ENOENT and self._is_unmapped()):
                self._after(error, position)
                break
            self._seen_quiet()
            with self._lock:
                if self._is_flying(position, position + step):
                    break
                if error:
                    self.pending.take(position, position + step)
            if error:
                self._let_go(position, step)
            position += step
            step *= 2
        return position, asks

    def _is_flying(self, start: int, end: int) -> bool:
        """Whether another thread is copying there; it may fail yet. To be asked with the lock held."""
        return any(each.start < end and start < each.end for each in self._flying)

    def _is_to_come(self, part: Range) -> bool:
        """Whether something of ``part`` is still to come, or another thread is copying there and may yet fail."""
        with self._lock:
            return self._is_flying(part.start, part.end) or bool(self.pending.overlap(part.start, part.end))

    # --- faults -----------------------------------------------------------------------------------

    def serve(self, address: int, *, wait: bool = True) -> Served:
        """Gives the page at ``address``, and its neighbours, to whoever waits for it.

        Without ``wait`` only what the source has at hand, and SLOW where that page is not. Raises ImageError or
        Untrusted when the contents cannot be had, PagerError when they cannot be given.
        """
        changes = self._changes
        window, stream = self._window(address)
        if window is None:
            return self._serve_zeros(address)
        if not wait and (window := self._at_hand(window, address)) is None:
            return Served.SLOW
        result, copied = self.bring([window])
        if copied:
            self.counters.faults += 1
            self.counters.fault_bytes += copied
            if stream:
                self._follow(stream, window.end)
            if self.on_copy:
                self.on_copy(self.pages_id, window.offset, window.length)
        if result is Served.DONE and (
            # While the source was waited for the page was given up, or moved, and nobody has given it or woken anybody.
            changes != self._changes
            # Claimed by another thread since we looked: its copy may still fail.
            or self._is_to_come(window.cut(address, address + PAGE_SIZE))
        ):
            return Served.LATER
        return result

    def _window(self, address: int) -> tuple[Range | None, _Stream | None]:
        """What to bring in for a fault at ``address``: more, the longer faults go upwards there.

        And the stream that is to be led on where it came in; none where the replay says what is needed.
        """
        with self._lock:
            found = self.pending.at(address)
            if found is None:
                return None, None
            if self.expected and (
                piece := self.expected(self.pages_id, found.offset + address - found.start)
            ):
                shift = found.start - found.offset
                return found.cut(piece[0] + shift, piece[1] + shift), None
            for stream in self._streams:
                if stream.expected <= address < stream.expected + MINIMUM_WINDOW:
                    return found.cut(address, address + stream.window), stream
            low = address & -MINIMUM_WINDOW
            return found.cut(low, low + MINIMUM_WINDOW), _Stream(low, MINIMUM_WINDOW)

    def _at_hand(self, window: Range, address: int) -> Range | None:
        """As much of ``window`` as need not be waited for: all, less from ``address`` on, or not even that page."""
        if self.source.ready(window.offset, window.length):
            return window
        for length in (MINIMUM_WINDOW, PAGE_SIZE):
            part = window.cut(address, address + length)
            if self.source.ready(part.offset, part.length):
                return part
        return None

    def _follow(self, stream: _Stream, end: int) -> None:
        """What a fault asked for came in, up to ``end``."""
        with self._lock:
            stream.expected, stream.window = end, min(2 * stream.window, MAXIMUM_WINDOW)
            if stream not in self._streams:
                self._streams.insert(0, stream)
                del self._streams[_STREAMS:]

    def _serve_zeros(self, address: int) -> Served:
        """Memory that the image has nothing for, or that was given up: zeros, as the kernel would give."""
        with self.gate.copying():
            if self.dead:
                return Served.GONE
            with self._lock:
                flying = sorted(each.start for each in self._flying if each.end > address)
                if self.pending.at(address) or (flying and flying[0] <= address):
                    return Served.LATER
                _, high = self.pending.gap(address, address, (address & -MINIMUM_WINDOW) + MINIMUM_WINDOW)
                high = min([high, *flying])
            done, error = userfaultfd.zero(self.descriptor, address, high - address)
            if error == errno.ENOENT and high - address > PAGE_SIZE:
                done, error = userfaultfd.zero(self.descriptor, address, PAGE_SIZE)
            if done:
                self._seen_quiet()
            if error in (errno.EEXIST, errno.ENOENT):
                self._wake(address)
            if error not in _SHORT:
                self._short_since = 0.0
        self.counters.zero_faults += 1
        if done or error in (errno.EEXIST, errno.ENOENT):
            return Served.DONE
        return self._after(error, address)

    # --- copies -----------------------------------------------------------------------------------

    def bring(self, wanted: Sequence[Range]) -> tuple[Served, int]:
        """Copies what of ``wanted`` is pending and was not moved since; returns the outcome and the bytes copied.

        Loads them first. The copying is one step: no message is read meanwhile. What another thread is copying is left
        to it. Raises ImageError, Untrusted, PagerError.
        """
        loaded = [self.source.load(each.offset, each.length) for each in wanted]
        with self.gate.copying():
            if self.dead:
                return Served.GONE, 0
            with self._lock:
                claimed, moved = self._claim(wanted, loaded)
            result = Served.LATER if moved else Served.DONE
            left = [each for each, _ in claimed]
            copied = 0
            try:
                for position, (each, shift) in enumerate(claimed):
                    left = [later for later, _ in claimed[position:]]
                    outcome, rest, done = self._copy_one(each, shift)
                    copied += done
                    if outcome is not Served.DONE:
                        result, left = outcome, rest + left[1:]
                        break
                else:
                    left = []
                if copied:
                    self._seen_quiet()
            finally:
                with self._lock:
                    self._flying.difference_update(each for each, _ in claimed)
                    for each in left:
                        self.pending.put(each)
        return result, copied

    def _claim(self, wanted: Sequence[Range], loaded: Sequence[int]) -> tuple[list[tuple[Range, int]], bool]:
        """Takes what is to be copied out of ``pending``: (range, from its addresses to ours).

        The second says whether something else is pending there by now, having been moved there.
        """
        claimed: list[tuple[Range, int]] = []
        moved = False
        for each, address in zip(wanted, loaded, strict=True):
            for found in self.pending.take(each.start, each.end):
                if found.offset - found.start == each.offset - each.start:
                    claimed.append((found, address - each.start))
                    self._flying.add(found)
                else:
                    self.pending.put(found)
                    moved = True
        return claimed, moved

    def _copy_one(self, wanted: Range, shift: int) -> tuple[Served, list[Range], int]:
        """Copies one claimed range. Returns the outcome, what is still pending of it, the bytes copied."""
        position, end = wanted.start, wanted.end
        step = end - position
        copied = 0
        while position < end:
            step = min(step, end - position)
            done, error = userfaultfd.copy(self.descriptor, position, position + shift, step)
            position += done
            copied += done
            if error not in _SHORT:
                self._short_since = 0.0
            if not error:
                step *= 2  # back to the whole rest after a boundary
            elif error == errno.EEXIST:
                # There already, whoever brought it: it is not ours to change. Waiters may have missed the wake.
                self._wake(position)
                position += PAGE_SIZE
            elif error == errno.ENOENT and step > PAGE_SIZE:
                step = _half(step)  # a copy must lie within one mapping: mprotect splits them
            elif error == errno.ENOENT and self._is_unmapped():
                self._let_go(position)
                position += PAGE_SIZE
            else:
                outcome = self._after(error, position)
                return outcome, [] if outcome is Served.GONE else [wanted.cut(position, end)], copied
        return Served.DONE, [], copied

    def _is_unmapped(self) -> bool:
        """What an ENOENT for one page means: it is mapped no more (or was MADV_DONTFORK in a child), or it moved.

        The kernel asks whether anything is changing before it waits for the lock of the mapping, and again only when
        it found one (userfaultfd_copy, mfill_atomic). A copy that waited there while another thread's mremap(2) moved
        the page elsewhere answers ENOENT. The move is still counted then: its message waits until copies are over.
        """
        return self.restored and userfaultfd.condition(self.descriptor) is not Condition.CHANGING

    def _let_go(self, address: int, length: int = PAGE_SIZE) -> None:
        """Of what is mapped no more; whoever waits for it is to see that for himself."""
        self.counters.dropped_bytes += length
        self._wake(address, length)

    def _after(self, error: int, address: int) -> Served:
        """What an error means for the whole address space. Raises PagerError where the instance cannot go on."""
        if error in (errno.EAGAIN, errno.ENOENT):
            self.counters.again += 1
            return Served.LATER
        if error == errno.ESRCH or (error == errno.ENOSPC and not userfaultfd.alive(self.descriptor)):
            self.dead = True
            return Served.GONE
        if error in _SHORT:
            now = time.monotonic()
            if not self._short_since or now - self._short_at > _MEMORY_PAUSE_SECONDS:
                self._short_since = now
            self._short_at = now
            if now - self._short_since < MEMORY_PATIENCE_SECONDS:
                return Served.LATER
        raise PagerError(
            f"process {self.name}: the page at {address:#x} could not be given ({os.strerror(error)})",
            hint="see the kernel's log; the instance was killed, it must not run on without this page",
        )

    def _wake(self, address: int, length: int = PAGE_SIZE) -> None:
        try:
            userfaultfd.wake(self.descriptor, address, length)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise

    def close(self) -> None:
        """Lets go of the userfaultfd: the kernel gives zeros for whatever is missing from now on."""
        with self.gate.reading():
            self.dead = True
            os.close(self.descriptor)


def _half(length: int) -> int:
    """In whole pages."""
    return (length // 2) & -PAGE_SIZE
