"""AddressSpace against a kernel and an app in miniature: any order of events, faults, copies, any moment."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pager.miniature import (
    BASE,
    GONE,
    PAGE,
    PAGES,
    ZERO,
    Memory,
    Partly,
    Refused,
    Source,
    kernel,
    restored,
)
from relume.errors import PagerError
from relume.linux.userfaultfd import Fault, Fork, Remap, Remove, Unmap
from relume.pager import space as module
from relume.pager.ranges import Range, RangeMap
from relume.pager.space import AddressSpace, Served

page_numbers = st.integers(0, PAGES - 1)
counts = st.integers(1, 12)


class Life(RuleBasedStateMachine):
    """A process and its children, under the pager, in any order of events."""

    def __init__(self) -> None:
        super().__init__()
        self._context = kernel()
        self.kernel = self._context.__enter__()
        self.spaces = [restored(self.kernel, range(0, PAGES, 1))]
        self.next_place = BASE + 10 * PAGES

    @initialize(delay=st.integers(0, 3))
    def wake_slowly(self, delay: int) -> None:
        self.kernel.memories[3].delay = delay

    def teardown(self) -> None:
        for memory in self.kernel.memories.values():
            memory.meanwhile = None
        self.settle()
        for space in self.spaces:
            memory = self.kernel.memories[space.descriptor]
            while (wanted := space.next_pending(0)) is not None and not space.dead:
                space.bring([wanted])
            for page in [] if memory.dead else memory.mapped:
                assert self._sees(space, page) == memory.owed[page], hex(page)
        self._context.__exit__(None, None, None)

    def _pick(self, which: int) -> tuple[AddressSpace, Memory]:
        space = self.spaces[which % len(self.spaces)]
        return space, self.kernel.memories[space.descriptor]

    def _pages(self, memory: Memory, page: int, count: int) -> list[int]:
        """Up to ``count`` neighbouring mapped pages."""
        mapped = sorted(memory.mapped)
        first = mapped[page % len(mapped)]
        found = [first]
        while len(found) < count and found[-1] + 1 in memory.mapped:
            found.append(found[-1] + 1)
        return found

    def _sees(self, space: AddressSpace, page: int) -> int:
        """What the app reads at ``page``: a fault, if it is missing, until it is served, or the page moved away."""
        memory = self.kernel.memories[space.descriptor]
        if page not in memory.present:
            memory.events.appendleft(Fault(page * PAGE))
            for _ in range(10):
                self.deliver(space)
                for address in list(space.waiting):
                    if space.serve(address) is not Served.LATER:
                        space.waiting.discard(address)
                if page in memory.present or page not in memory.mapped:
                    break
        return memory.present[page] if page in memory.mapped else GONE

    def deliver(self, space: AddressSpace) -> None:
        born = space.read()
        self.spaces += born
        for each in (space, *born):
            each.settle()

    def settle(self) -> None:
        for space in list(self.spaces):
            self.deliver(space)

    def _quiet(self, space: AddressSpace) -> None:
        """The thread that causes an event waits for its reading; the next one, here, until the loop knows all."""
        memory = self.kernel.memories[space.descriptor]
        while memory.changing or space.unsettled:
            if memory.changing:
                self.deliver(space)
            else:
                space.settle()

    @rule(which=st.integers(0, 9), page=page_numbers)
    def look(self, which: int, page: int) -> None:
        space, memory = self._pick(which)
        if memory.mapped and not memory.dead:
            number = self._pages(memory, page, 1)[0]
            assert self._sees(space, number) == memory.owed.get(number, GONE)

    @rule(which=st.integers(0, 9), page=page_numbers, count=counts)
    def bring(self, which: int, page: int, count: int) -> None:
        """Replay and fill, at any time, events unread or not; where the page was at the dump."""
        space, _ = self._pick(which)
        for wanted in space.locate(page * PAGE, min(count, PAGES - page) * PAGE):
            space.bring([wanted])

    @rule(which=st.integers(0, 9), page=page_numbers, count=counts)
    def give_up(self, which: int, page: int, count: int) -> None:
        space, memory = self._pick(which)
        if not memory.mapped or memory.dead:
            return
        self._quiet(space)
        pages = self._pages(memory, page, count)
        memory.events.append(Remove(pages[0] * PAGE, (pages[-1] + 1) * PAGE))
        memory.changing = True
        for number in pages:  # zapped once the event is read: nothing can come in before, nothing is seen
            memory.present.pop(number, None)
            memory.owed[number] = ZERO

    @rule(which=st.integers(0, 9), page=page_numbers, count=counts, grown=st.booleans())
    def unmap(self, which: int, page: int, count: int, grown: bool) -> None:
        """``grown``: what lies below grows in there at once, before the loop can ask about it."""
        space, memory = self._pick(which)
        if len(memory.mapped) < 16 or memory.dead:
            return
        self._quiet(space)
        pages = self._pages(memory, page, count)
        for number in pages:
            memory.mapped.discard(number)
            memory.present.pop(number, None)
            memory.owed.pop(number, None)
        memory.events.append(Unmap(pages[0] * PAGE, (pages[-1] + 1) * PAGE))
        memory.changing = True
        if grown and pages[0] - 1 in memory.mapped:
            self.deliver(space)
            self._grow(memory, pages[0], count)

    @rule(which=st.integers(0, 9), page=page_numbers, count=counts, unmap_first=st.booleans())
    def move(self, which: int, page: int, count: int, unmap_first: bool) -> None:
        space, memory = self._pick(which)
        if not memory.mapped or memory.dead:
            return
        self._quiet(space)
        self._move(memory, page, count, unmap_first)

    @rule(which=st.integers(0, 9), page=page_numbers, count=counts, unmap_first=st.booleans())
    def move_meanwhile(self, which: int, page: int, count: int, unmap_first: bool) -> None:
        """The next copy or zeros wait for it, having seen that nothing changes."""
        _, memory = self._pick(which)
        if memory.mapped and not memory.dead:
            memory.meanwhile = lambda: self._move(memory, page, count, unmap_first)

    def _move(self, memory: Memory, page: int, count: int, unmap_first: bool) -> None:
        pages = self._pages(memory, page, count)
        shift = self.next_place - pages[0]
        self.next_place += 50
        for number in pages:
            memory.mapped.discard(number)
            memory.mapped.add(number + shift)
            memory.owed[number + shift] = memory.owed.pop(number)
            if number in memory.present:
                memory.present[number + shift] = memory.present.pop(number)
        low, high = pages[0] * PAGE, (pages[-1] + 1) * PAGE
        memory.events.append(Remap(low, low + shift * PAGE, high - low))
        memory.events.append(Unmap(low, high))
        if unmap_first:
            # Another thread unmapped what lay at the destination just before, and is heard of only now.
            memory.events.append(Unmap(low + shift * PAGE, high + shift * PAGE))
        memory.changing = True

    @rule(which=st.integers(0, 9), page=page_numbers, count=counts)
    def grow(self, which: int, page: int, count: int) -> None:
        """mremap(2) makes a mapping longer where it is, and tells nobody: zeros, whatever lay there before."""
        space, memory = self._pick(which)
        if memory.mapped and not memory.dead:
            self._quiet(space)
            self._grow(memory, self._pages(memory, page, 10 * PAGES)[-1] + 1, count)

    def _grow(self, memory: Memory, end: int, count: int) -> None:
        for number in range(end, end + count):
            if number in memory.mapped:
                break
            memory.mapped.add(number)
            memory.owed[number] = ZERO

    @rule(which=st.integers(0, 9), page=page_numbers)
    def protect(self, which: int, page: int) -> None:
        """mprotect(2) splits a mapping and tells nobody."""
        _, memory = self._pick(which)
        memory.boundaries ^= {BASE + page}

    @precondition(lambda self: len(self.spaces) < 6)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        space, memory = self._pick(which)
        if memory.dead:
            return
        self._quiet(space)
        descriptor = 100 + len(self.kernel.memories)
        self.kernel.memories[descriptor] = memory.fork()
        memory.events.append(Fork(descriptor))
        memory.changing = True
        self.deliver(space)

    @precondition(lambda self: len(self.spaces) > 1)
    @rule(which=st.integers(0, 9))
    def end(self, which: int) -> None:
        _, memory = self._pick(which)
        memory.dead = True

    @rule()
    def deliver_all(self) -> None:
        self.settle()

    @invariant()
    def nothing_wrong_is_present(self) -> None:
        for space in self.spaces:
            memory = self.kernel.memories[space.descriptor]
            for page, content in memory.present.items():
                assert content == memory.owed[page], f"{space.name}: page {page:#x}"


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_faults_going_upwards_bring_more_each_time() -> None:
    with kernel() as made:
        space = restored(made)
        brought: list[int] = []
        space.on_copy = lambda _, offset, length: brought.append(length // PAGE)
        space.serve(BASE * PAGE)
        space.serve((BASE + 16) * PAGE)
        assert brought == [16, 24]


def test_what_is_not_at_hand_is_not_waited_for() -> None:
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        space.source = source = Partly(set(range(PAGES)) - {2})
        for page, outcome, brought in [(2, Served.SLOW, 0), (1, Served.DONE, 1), (3, Served.DONE, 33)]:
            assert space.serve((BASE + page) * PAGE, wait=False) is outcome
            assert len(memory.present) == brought
        assert [pages for _, pages in source.loaded] == [range(1, 2), range(3, 35)]
        assert space.serve((BASE + 2) * PAGE) is Served.DONE
        assert memory.present[BASE + 2] == 2


def test_a_copy_that_failed_makes_no_faults_expected() -> None:
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        for page in (0, 16):
            memory.changing = True
            for _ in range(3):
                assert space.serve((BASE + page) * PAGE) is Served.LATER
            memory.changing = False
            assert space.serve((BASE + page) * PAGE) is Served.DONE
        assert [stream.window for stream in space._streams] == [64 * PAGE]


def test_a_copy_across_mappings_is_split() -> None:
    with kernel() as made:
        space = restored(made)
        made.memories[3].boundaries = {BASE + 3, BASE + 7, BASE + 8}
        outcome, copied = space.bring([Range(BASE * PAGE, (BASE + PAGES) * PAGE, 0)])
        assert (outcome, copied) == (Served.DONE, PAGES * PAGE)
        assert space.complete


def test_a_page_that_another_thread_has_claimed_is_not_given_yet() -> None:
    """A fault is looked up, the disk is waited for, and meanwhile the replay claims the page: its copy may fail."""
    with kernel() as made:
        space, page = restored(made), BASE + 5
        replay = Refused(made, space, Range(page * PAGE, (page + 20) * PAGE, 5 * PAGE))

        def load(offset: int, length: int) -> int:
            space.source.load = Source().load  # type: ignore[method-assign]
            replay.begin()
            return offset

        space.source.load = load  # type: ignore[method-assign]
        assert space.serve(page * PAGE) is Served.LATER
        assert set(made.memories[3].present) == set(range(BASE, page))
        replay.end()
        assert space.serve(page * PAGE) is Served.DONE
        assert made.memories[3].present[page] == 5


@pytest.mark.parametrize("event", [Remove, Unmap, Remap])
def test_a_page_that_is_given_up_while_its_contents_are_waited_for_is_not_forgotten(event: type) -> None:
    """Nobody gave it, and the kernel wakes nobody: whoever waits for it would wait for ever."""
    with kernel() as made:
        space, memory, page, above = restored(made), made.memories[3], BASE + 5, BASE + PAGES
        woken: list[int] = []
        made.wake = lambda _, start, length: woken.append(start // PAGE)  # type: ignore[method-assign]

        def load(offset: int, length: int) -> int:
            space.source.load = Source().load  # type: ignore[method-assign]
            arguments = (
                (page * PAGE, above * PAGE, PAGE) if event is Remap else (page * PAGE, (page + 1) * PAGE)
            )
            memory.events.append(event(*arguments))
            if event is not Remove:
                memory.mapped.discard(page)
            space.read()
            return offset

        space.source.load = load  # type: ignore[method-assign]
        assert space.serve(page * PAGE) is Served.LATER
        assert space.serve(page * PAGE) is Served.DONE
        assert memory.present.get(page) == ZERO if event is Remove else page in woken


def test_a_copy_that_is_refused_while_one_looks_is_not_the_end() -> None:
    """What is to come is claimed at one look, and put back before the next: nothing of it may be let go."""
    with kernel() as made:
        space = restored(made)
        replay = Refused(made, space, Range(BASE * PAGE, (BASE + PAGES) * PAGE, 0))

        class Looked(RangeMap):
            @property
            def total(self) -> int:
                found = self._total
                if replay.begun and threading.current_thread() is threading.main_thread():
                    replay.end(0.2)
                return found

            @total.setter
            def total(self, value: int) -> None:
                self._total = value

        space.pending = Looked(space.pending)
        replay.begin()
        assert not space.complete
        replay.end()
        assert space.pending.total == PAGES * PAGE


def test_a_fault_that_a_thread_gives_back_is_seen_in_one_of_both_places() -> None:
    with kernel() as made:
        space = restored(made, range(0))

        class Waiting(set[int]):
            def __bool__(self) -> bool:
                found = len(self) > 0
                self.add(BASE * PAGE)  # by another thread, after the look
                space.asked.clear()
                return found

        space.asked = {BASE * PAGE}
        space.waiting = Waiting()
        assert not space.complete


def test_what_is_doubtful_stays_so_while_another_thread_copies_it() -> None:
    """It was unmapped, say: its copy is refused, and what comes to lie there must not get the old contents."""
    with kernel() as made:
        space = restored(made)
        wanted = Range(BASE * PAGE, (BASE + 4) * PAGE, 0)
        replay = Refused(made, space, wanted)
        replay.begin()
        space.doubtful.append(wanted)
        space.settle()
        assert space.doubtful == [wanted]
        replay.end()
        made.memories[3].mapped -= set(range(BASE, BASE + 4))
        space.settle()
        assert not space.doubtful
        assert not space.pending.overlap(wanted.start, wanted.end)


def test_a_page_that_moves_while_its_copy_waits_for_the_lock_is_not_forgotten() -> None:
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        above = BASE + PAGES

        def move() -> None:
            memory.mapped.remove(BASE)
            memory.mapped.add(above)
            memory.events += [Remap(BASE * PAGE, above * PAGE, PAGE), Unmap(BASE * PAGE, (BASE + 1) * PAGE)]
            memory.changing = True

        memory.meanwhile = move
        assert space.bring([Range(BASE * PAGE, (BASE + 1) * PAGE, 0)]) == (Served.LATER, 0)
        space.read()
        assert space.serve(above * PAGE) is Served.LATER
        assert space.serve(above * PAGE) is Served.DONE
        assert memory.present[above] == 0


def test_who_waits_for_what_was_unmapped_is_woken() -> None:
    """The kernel wakes nobody for an unmapping (fs/userfaultfd.c); woken, the thread gets what it would without us."""
    with kernel() as made:
        space, woken = restored(made, range(20)), []
        made.wake = lambda _, start, length: woken.append((start // PAGE, length))  # type: ignore[method-assign]
        made.memories[3].mapped -= {BASE + 5, BASE + 30}
        for page in (BASE + 5, BASE + 30):
            assert space.serve(page * PAGE) is Served.DONE
            assert (page, PAGE) in woken


def test_what_was_moved_and_then_unmapped_does_not_come_back() -> None:
    """The neighbour below grows into the place: no event, and no contents of what was there."""
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        above = BASE + PAGES
        memory.mapped = {BASE, *range(above, above + PAGES - 1)}
        memory.events.append(Remap((BASE + 1) * PAGE, above * PAGE, (PAGES - 1) * PAGE))
        space.read()
        memory.events.append(Unmap(above * PAGE, (above + PAGES - 1) * PAGE))
        space.read()
        assert space.pending.total == PAGE
        assert space.serve(above * PAGE) is Served.DONE
        assert memory.present[above] == ZERO


@pytest.mark.parametrize("seen_by", ["copy", "zeros", "probe", "loop"])
def test_what_was_moved_and_much_later_unmapped_does_not_come_back(seen_by: str) -> None:
    """As above, but as the kernel does it: something is changing when a message is read, and a moment longer."""
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        above = BASE + PAGES
        memory.mapped = {BASE, BASE + PAGES // 2, *range(above, above + PAGES - 1)}
        memory.events.append(Remap((BASE + 1) * PAGE, above * PAGE, (PAGES - 1) * PAGE))
        memory.changing = True
        space.read()
        memory.waking = 0
        if seen_by == "copy":
            assert space.bring([Range(BASE * PAGE, (BASE + 1) * PAGE, 0)]) == (Served.DONE, PAGE)
        elif seen_by == "zeros":
            assert space.serve((BASE + PAGES // 2) * PAGE) is Served.DONE
        elif seen_by == "probe":
            space.probe()
        else:
            space.settle()
        memory.mapped -= set(range(above, above + PAGES))
        memory.events.append(Unmap(above * PAGE, (above + PAGES - 1) * PAGE))
        memory.changing = True
        space.read()
        space.settle()
        memory.mapped |= set(range(above, above + PAGES))  # what grows in there
        memory.waking = 0
        assert not space.pending.overlap(above * PAGE, (above + PAGES) * PAGE)
        assert space.serve(above * PAGE) is Served.DONE
        assert memory.present[above] == ZERO


def test_a_move_is_asked_about_until_all_is_quiet() -> None:
    """Not longer: the loop goes round without rest for it."""
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        memory.delay = 3
        memory.events.append(Remap(BASE * PAGE, (BASE + PAGES) * PAGE, PAGE))
        memory.changing = True
        space.read()
        for _ in range(3):
            space.settle()
            assert space.unsettled
        space.settle()
        assert not space.unsettled
        memory.events.append(Remap((BASE + 1) * PAGE, (BASE + PAGES + 1) * PAGE, PAGE))
        space.read()
        memory.dead = True
        space.settle()
        assert not space.unsettled


def test_a_child_doubts_what_its_parent_does() -> None:
    """Moved, unmapped and forked between two looks: what grows in there is not what was moved, in neither of them."""
    with kernel() as made:
        space, memory, above = restored(made), made.memories[3], BASE + PAGES
        memory.mapped = set()
        made.memories[9] = memory.fork()
        memory.events += [
            Remap(BASE * PAGE, above * PAGE, PAGES * PAGE),
            Unmap(above * PAGE, (above + PAGES) * PAGE),
            Fork(9),
        ]
        memory.changing = True
        (child,) = space.read()
        for each in (space, child):
            assert each.unsettled
            while each.unsettled:
                each.settle()
            made.memories[each.descriptor].mapped = set(range(above, above + PAGES))
            assert each.complete
            assert each.serve(above * PAGE) is Served.DONE
            assert made.memories[each.descriptor].present[above] == ZERO


@pytest.mark.parametrize("pieces", [1, 5000])
def test_messages_do_not_wait_until_all_that_is_doubtful_was_asked_about(pieces: int) -> None:
    with kernel() as made:
        space, ask, asked = restored(made, range(0)), made.ask, 0

        def counted(descriptor: int, start: int, length: int) -> int:
            nonlocal asked
            asked += 1
            return ask(descriptor, start, length)

        made.ask = counted  # type: ignore[method-assign]
        made.memories[3].mapped = set()
        length = 10000 // pieces
        for piece in range(pieces):
            start = BASE + 2 * piece * length
            space.pending.put(Range(start * PAGE, (start + length) * PAGE, start * PAGE))
        space.doubtful = list(space.pending)
        while space.doubtful:
            before = asked
            space.settle()
            assert asked - before <= 64
        assert space.complete
        assert asked < 16000


def test_of_moves_no_more_is_kept_than_there_is_to_come() -> None:
    with kernel() as made:
        space, memory = restored(made, range(4)), made.memories[3]
        place = BASE
        for _ in range(100):
            memory.events.append(Remap(place * PAGE, (place + 100) * PAGE, 4 * PAGE))
            memory.events.append(Remap((place + 50) * PAGE, (place + 150) * PAGE, 4 * PAGE))
            memory.changing = True
            space.read()
            place += 100
        assert space.pending.total == 4 * PAGE
        assert space._moved.total <= 4 * PAGE


@pytest.mark.parametrize("unmapped", [False, True])
def test_what_is_doubtful_is_asked_about_whether_or_not_it_is_at_hand(unmapped: bool) -> None:
    """A disk that is waited for keeps others waiting, and leaves time for something else to come to lie there."""
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        space.source = source = Partly(set())
        half = set(range(BASE, BASE + PAGES // 2))
        memory.mapped -= half if unmapped else set()
        memory.boundaries = {BASE + 3, BASE + 5}
        space.doubtful = list(space.pending)
        space.settle()
        assert not space.doubtful
        assert not source.loaded
        assert not memory.present
        assert space.pending.total == (PAGES // 2 if unmapped else PAGES) * PAGE


@pytest.mark.parametrize("gone", [0, 1])
def test_what_moves_while_it_is_asked_about_is_not_forgotten(gone: int) -> None:
    """Also where pages before it are unmapped, of which the kernel has said so already."""
    with kernel() as made:
        space, memory, above = restored(made, range(gone + 1)), made.memories[3], BASE + PAGES
        ask, moving = made.ask, BASE + gone
        memory.mapped -= set(range(BASE, moving))

        def move() -> None:
            memory.mapped = {above}
            memory.events.append(Remap(moving * PAGE, above * PAGE, PAGE))
            memory.changing = True

        def ask_slowly(descriptor: int, start: int, length: int) -> int:
            if (start, length) == (moving * PAGE, PAGE):
                memory.meanwhile = move
            return ask(descriptor, start, length)

        made.ask = ask_slowly  # type: ignore[method-assign]
        space.doubtful = list(space.pending)
        space.settle()
        made.ask = ask  # type: ignore[method-assign]
        while memory.changing or space.unsettled:
            space.read()
            space.settle()
        assert list(space.pending) == [Range(above * PAGE, (above + 1) * PAGE, gone * PAGE)]


@pytest.mark.parametrize("unmapped", [False, True])
def test_moved_and_unmapped_in_one_breath(unmapped: bool) -> None:
    """Which of the two came first cannot be told by the messages; it is by asking, as soon as they were read."""
    with kernel() as made:
        space, memory = restored(made), made.memories[3]
        above = BASE + PAGES
        memory.mapped = set() if unmapped else set(range(above, above + PAGES))
        memory.events += [
            Remap(BASE * PAGE, above * PAGE, PAGES * PAGE),
            Unmap(above * PAGE, (above + PAGES) * PAGE),
        ]
        memory.changing = True
        space.read()
        space.settle()
        assert not space.doubtful
        assert space.complete == unmapped
        space.bring(list(space.pending))
        assert memory.present == ({} if unmapped else {above + page: page for page in range(PAGES)})
        assert space.complete


def test_before_criu_is_done_a_missing_registration_is_not_an_end() -> None:
    with kernel() as made:
        space = restored(made)
        space.restored = False
        mapped, made.memories[3].mapped = made.memories[3].mapped, set()
        assert space.bring([Range(BASE * PAGE, (BASE + 4) * PAGE, 0)]) == (Served.LATER, 0)
        assert space.pending.total == PAGES * PAGE
        made.memories[3].mapped = mapped
        assert space.bring([Range(BASE * PAGE, (BASE + 4) * PAGE, 0)]) == (Served.DONE, 4 * PAGE)


def test_a_child_gets_zeros_where_the_parent_said_so() -> None:
    with kernel() as made:
        space = restored(made)
        space.wiped = RangeMap([Range((BASE + 4) * PAGE, (BASE + 8) * PAGE, 0)])
        made.memories[9] = made.memories[3].fork()
        made.memories[3].events.append(Fork(9))
        (child,) = space.read()
        assert child.pending.total == (PAGES - 4) * PAGE
        assert child.serve((BASE + 5) * PAGE) is Served.DONE
        assert made.memories[9].present[BASE + 5] == ZERO
        assert space.pending.total == PAGES * PAGE


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(errno.EAGAIN, Served.LATER), (errno.ESRCH, Served.GONE), (errno.ENOMEM, Served.LATER)],
)
def test_what_an_error_means(error: int, outcome: Served) -> None:
    with kernel() as made:
        space = restored(made)
        made.copy = lambda *_: (0, error)  # type: ignore[method-assign]
        assert space.serve(BASE * PAGE) is outcome
        assert space.pending.total == (0 if outcome is Served.GONE else PAGES * PAGE) or space.dead


def test_enospc_of_the_living_and_of_the_dead() -> None:
    for dead in (True, False):
        with kernel() as made:
            space = restored(made)
            made.copy = lambda *_: (0, errno.ENOSPC)  # type: ignore[method-assign]
            made.memories[3].dead = dead
            assert space.serve(BASE * PAGE) is (Served.GONE if dead else Served.LATER)


def test_memory_that_stays_short_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernel() as made:
        space = restored(made)
        made.copy = lambda *_: (0, errno.ENOMEM)  # type: ignore[method-assign]
        monkeypatch.setattr(module, "MEMORY_PATIENCE_SECONDS", 0.0)
        with pytest.raises(PagerError, match="Cannot allocate memory"):
            space.serve(BASE * PAGE)


@pytest.mark.parametrize("between", ["a page", "a page that was there", "zeros", "nobody asked"])
def test_memory_that_is_short_now_and_then_is_none(monkeypatch: pytest.MonkeyPatch, between: str) -> None:
    with kernel() as made:
        space, memory, copy, zero = restored(made, range(8)), made.memories[3], made.copy, made.zero
        now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: now)

        def short(*_: int) -> tuple[int, int]:
            return 0, errno.ENOMEM

        pause = 60.0 if between == "nobody asked" else 0.9
        for page in range(8):
            made.copy = made.zero = short  # type: ignore[method-assign]
            assert space.serve((BASE + page) * PAGE) is Served.LATER
            made.copy, made.zero = copy, zero  # type: ignore[method-assign]
            if between == "zeros":
                assert space.serve((BASE + 20 + page) * PAGE) is Served.DONE
                memory.present.clear()
            elif between != "nobody asked":
                if between == "a page that was there":
                    memory.present[BASE + page] = page
                space.bring([Range((BASE + page) * PAGE, (BASE + page + 1) * PAGE, page * PAGE)])
                space.pending.take(0, (BASE + page + 1) * PAGE)
            now += pause


def test_an_unreadable_source_is_an_end() -> None:
    with kernel() as made:
        space = restored(made)
        made.copy = lambda *_: (0, errno.EFAULT)  # type: ignore[method-assign]
        with pytest.raises(PagerError, match="Bad address"):
            space.serve(BASE * PAGE)
