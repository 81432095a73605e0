"""A kernel and an app in miniature, for everything that works on an AddressSpace.

The miniature keeps, per page, what the app must see, and refuses copies as the kernel does while an event is
queued. What the pager makes of it must never show the app anything else than what it is owed.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from relume.linux.userfaultfd import Condition, Message
from relume.pager import space as module
from relume.pager.ranges import Range, RangeMap
from relume.pager.space import AddressSpace

PAGE = 4096
PAGES = 40
BASE = 0x100
"""The first page number of the image's memory; moves go above it."""

ZERO = -1
"""The content "reads as zeros"; any other is a page number in the pages file."""

GONE = -2
"""What is read where nothing is mapped."""


class Memory:
    """One process: mapped pages, which of them are present, and what the app is owed at each."""

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.present: dict[int, int] = {}
        self.owed: dict[int, int] = {}
        self.events: deque[Message] = deque()
        self.changing = False
        """An event is queued, or its cause has not gone on yet."""
        self.delay = 1
        """How often the kernel still answers so once the events were read: their cause has to wake first."""
        self.waking = 0
        self.dead = False
        self.boundaries: set[int] = set()
        self.meanwhile: Callable[[], None] | None = None
        """What another thread does while a copy waits for the lock of the mapping."""

    def fork(self) -> Memory:
        child = Memory()
        child.mapped, child.present, child.owed = set(self.mapped), dict(self.present), dict(self.owed)
        child.boundaries = set(self.boundaries)
        child.delay = self.delay
        return child

    def is_changing(self) -> bool:
        """What the kernel says to one who asks now, or wants to give something."""
        if not self.changing and self.waking:
            self.waking -= 1
            return True
        return self.changing


class Kernel:
    """userfaultfd calls as relume.linux.userfaultfd has them, over :class:`Memory`; sources are page numbers."""

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}

    def read(self, descriptor: int, limit: int = 64) -> list[Message]:
        memory = self.memories[descriptor]
        found = list(memory.events)
        memory.events.clear()
        if memory.changing:
            memory.changing, memory.waking = False, memory.delay
        return found

    def copy(self, descriptor: int, destination: int, source: int, length: int) -> tuple[int, int]:
        return self._give(descriptor, destination, length, source // PAGE)

    def zero(self, descriptor: int, start: int, length: int) -> tuple[int, int]:
        return self._give(descriptor, start, length, None)

    def ask(self, descriptor: int, start: int, length: int) -> int:
        memory = self.memories[descriptor]
        if memory.dead:
            return errno.ESRCH
        if memory.is_changing():
            return errno.EAGAIN
        return self._placed(memory, range(start // PAGE, (start + length) // PAGE))

    def wake(self, descriptor: int, start: int, length: int) -> None:
        pass

    def alive(self, descriptor: int) -> bool:
        return not self.memories[descriptor].dead

    def condition(self, descriptor: int) -> Condition:
        memory = self.memories[descriptor]
        if memory.dead:
            return Condition.GONE
        return Condition.CHANGING if memory.is_changing() else Condition.QUIET

    def _give(self, descriptor: int, start: int, length: int, source: int | None) -> tuple[int, int]:
        memory = self.memories[descriptor]
        pages = range(start // PAGE, (start + length) // PAGE)
        if memory.dead:
            return 0, errno.ESRCH
        if memory.is_changing():
            return 0, errno.EAGAIN
        if error := self._placed(memory, pages):
            return 0, error
        for count, page in enumerate(pages):
            if page in memory.present:
                return (count * PAGE, 0) if count else (0, errno.EEXIST)
            memory.present[page] = ZERO if source is None else source + count
        return length, 0

    def _placed(self, memory: Memory, pages: range) -> int:
        """What a copy fails with once it has the lock of the mapping, having seen that nothing changes."""
        if memory.meanwhile:
            meanwhile, memory.meanwhile = memory.meanwhile, None
            meanwhile()
        if memory.boundaries & set(pages[1:]) or not memory.mapped.issuperset(pages):
            return errno.ENOENT
        return errno.EAGAIN if memory.changing else 0


class Source:
    """Every byte of the pages file lies at the address that is its offset."""

    def ready(self, offset: int, length: int) -> bool:
        return True

    def prefetch(self, offset: int, length: int) -> None:
        pass

    def load(self, offset: int, length: int) -> int:
        return offset

    def close(self) -> None:
        pass


class Partly(Source):
    """Only the pages of the file in ``here`` are at hand. Keeps what was loaded, and in which thread."""

    def __init__(self, here: set[int]) -> None:
        self.here = here
        self.loaded: list[tuple[str, range]] = []

    def ready(self, offset: int, length: int) -> bool:
        return self.here.issuperset(range(offset // PAGE, (offset + length) // PAGE))

    def load(self, offset: int, length: int) -> int:
        pages = range(offset // PAGE, (offset + length) // PAGE)
        self.loaded.append((threading.current_thread().name, pages))
        return offset


@contextmanager
def kernel() -> Iterator[Kernel]:
    """The miniature in the place of the real calls."""
    made = Kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "userfaultfd", made)
        yield made


def restored(made: Kernel, pages: range = range(PAGES)) -> AddressSpace:
    """A process whose memory is ``pages``, nothing of it present."""
    memory = made.memories[3] = Memory()
    memory.mapped = {BASE + page for page in range(PAGES)}
    memory.owed = {BASE + page: page if page in pages else ZERO for page in range(PAGES)}
    ranges = [Range((BASE + page) * PAGE, (BASE + page + 1) * PAGE, page * PAGE) for page in pages]
    return AddressSpace(
        name="1",
        descriptor=3,
        pages_id=1,
        pending=RangeMap(ranges),
        layout=RangeMap(Range(page * PAGE, (page + 1) * PAGE, (BASE + page) * PAGE) for page in pages),
        source=Source(),
    )


class Refused:
    """A copy by another thread: claimed, under way until :meth:`end`, and then refused (EAGAIN)."""

    def __init__(self, made: Kernel, space: AddressSpace, wanted: Range) -> None:
        self._claimed, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: space.bring([wanted]))
        self._made = made
        made.copy = self._copy  # type: ignore[method-assign]

    @property
    def begun(self) -> bool:
        return self._claimed.is_set()

    def begin(self) -> None:
        self._thread.start()
        assert self._claimed.wait(10)

    def end(self, seconds: float = 10) -> None:
        """Waits until the pages are put back, ``seconds`` at most."""
        self._over.set()
        self._thread.join(seconds)

    def _copy(self, descriptor: int, destination: int, source: int, length: int) -> tuple[int, int]:
        if threading.current_thread() is self._thread:
            self._claimed.set()
            assert self._over.wait(10)
            return 0, errno.EAGAIN
        return Kernel.copy(self._made, descriptor, destination, source, length)
