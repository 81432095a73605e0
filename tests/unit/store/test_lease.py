"""Leases, with clocks of our own: one for each node, running at the same speed and showing different times."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relume.errors import Conflict, StoreError, Superseded
from relume.store.lease import Lease, Leases, Standing
from relume.store.objects import Objects

PREFIX = "lease/b/p"


class World:
    """One store, and time that passes only when told to."""

    def __init__(self) -> None:
        self.objects = Objects("memory:")
        self.now = 0.0

    def node(self, name: str, offset: float = 0.0) -> Leases:
        return Leases(self.objects, name, seconds=30.0, clock=lambda: self.now + offset)


def test_a_second_one_waits_for_silence_on_its_own_clock() -> None:
    world = World()
    a, b = world.node("a"), world.node("b", offset=1e9)
    lease = a.acquire(PREFIX)
    assert lease.number == 1
    for _ in range(10):
        with pytest.raises(Conflict):
            b.acquire(PREFIX)
        world.now += 20
        lease.renew()
    with pytest.raises(Conflict):
        b.acquire(PREFIX)
    world.now += 30
    with pytest.raises(Conflict):
        b.acquire(PREFIX)
    world.now += 0.1
    assert b.acquire(PREFIX).number == 2


def test_a_node_that_was_killed_does_not_wait_for_itself() -> None:
    world = World()
    lease = world.node("a").acquire(PREFIX)
    assert world.node("b").is_alive(PREFIX)
    restarted = world.node("a")
    assert not restarted.is_alive(PREFIX)
    assert restarted.acquire(PREFIX).number == lease.number + 1
    assert restarted.is_alive(PREFIX), "its own, of now"


def test_an_owner_knows_before_an_observer_takes_over() -> None:
    world = World()
    lease = world.node("a").acquire(PREFIX)
    world.now += 30
    lease.check()
    world.now += 0.1
    with pytest.raises(Superseded):
        lease.check()
    with pytest.raises(Superseded):
        lease.renew()  # too late is too late, even if nobody came
    with pytest.raises(Superseded):
        lease.check()


def test_a_release_lets_the_next_one_in_at_once() -> None:
    world = World()
    a, b = world.node("a"), world.node("b")
    with a.acquire(PREFIX).kept():
        assert b.is_alive(PREFIX)
    assert not b.is_alive(PREFIX)
    assert b.acquire(PREFIX).number == 2


def test_a_node_that_was_killed_takes_its_own_lease_over() -> None:
    world = World()
    before = world.node("a")
    before.acquire(PREFIX)
    with pytest.raises(Conflict):
        before.acquire(PREFIX)  # the same process is at it
    assert world.node("a").acquire(PREFIX).number == 2


def test_of_many_at_once_one_wins() -> None:
    world = World()
    won: list[Lease] = []

    def attempt(name: str) -> None:
        try:
            won.append(world.node(name).acquire(PREFIX))
        except Conflict:
            pass

    threads = [threading.Thread(target=attempt, args=(f"n{at}",)) for at in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_facts_are_for_others_to_read() -> None:
    world = World()
    world.node("a").acquire(PREFIX, tenant="app")
    assert world.node("b").facts(PREFIX, 1)["tenant"] == "app"
    world.objects.put(f"{PREFIX}/2/0", b"not json")
    assert world.node("b").facts(PREFIX, 2) == {}


def test_old_renewals_are_cleared_and_the_taking_stays() -> None:
    world = World()
    lease = world.node("a").acquire(PREFIX)
    for _ in range(5):
        lease.renew()
    names = [info.name for info in world.objects.list(PREFIX)]
    assert names == [f"{PREFIX}/1/0", f"{PREFIX}/1/5"]


@given(
    st.lists(
        st.sampled_from(["1/0", "1/1", "1/7", "1/done", "2/0", "2/3", "2/done", "x/0", "3/y", "junk", "10/0"])
    )
)
def test_the_standing_of_a_listing(names: list[str]) -> None:
    standing = Standing.of(names)
    numbers = {int(name.split("/")[0]) for name in names if name[0].isdecimal() and name != "3/y"}
    assert standing.number == max(numbers, default=0)
    assert standing.done == (standing.number == 0 or f"{standing.number}/done" in names)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from(["take", "renew", "work", "die", "release"]),
            st.floats(0, 25),
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_never_two_owners_who_both_believe_it(steps: list[tuple[str, str, float]]) -> None:
    """Whatever the nodes do and however long they sleep: at most one lease passes its own check."""
    world = World()
    nodes = {name: world.node(name, offset=1000.0 * at) for at, name in enumerate("abc")}
    held: dict[str, Lease] = {}
    numbers = []
    for name, step, pause in steps:
        world.now += pause
        try:
            if step == "take":
                held[name] = nodes[name].acquire(PREFIX)
                numbers.append(held[name].number)
            elif step == "renew" and name in held:
                held[name].renew()
            elif step == "release" and name in held:
                held.pop(name).release()
            elif step == "die":
                held.pop(name, None)
                nodes[name] = world.node(name, offset=world.now)
        except (StoreError, Conflict):
            pass
        believers = 0
        for lease in held.values():
            try:
                lease.check()
                believers += 1
            except Superseded:
                pass
        assert believers <= 1
    assert numbers == sorted(set(numbers)), "fencing tokens only grow"
