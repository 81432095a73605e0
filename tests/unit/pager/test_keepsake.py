"""Descriptors that a third process keeps: for as long as the pager has them, and longer if it is killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from relume.pager.keepsake import Keepsake, Kept

Pair = tuple[Keepsake, Kept, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends, and the socket of the first."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = Kept(theirs)
    yield Keepsake(ours), kept, ours
    kept.close()
    ours.close()


def _ended(reading: int) -> bool:
    """Whether the other end of a pipe is closed everywhere."""
    os.set_blocking(reading, False)
    try:
        return os.read(reading, 1) == b""
    except BlockingIOError:
        return False


def test_what_is_given_stays_open_until_it_is_taken_back(pair: Pair) -> None:
    keepsake, kept, _ = pair
    reading, writing = os.pipe()
    keepsake.give(writing)
    assert kept.receive()
    assert len(kept) == 1
    os.close(writing)
    assert not _ended(reading)
    keepsake.take_back(writing)
    assert kept.receive()
    assert _ended(reading)
    kept.close()
    kept.close()
    os.close(reading)


def test_it_outlives_the_giver(pair: Pair) -> None:
    keepsake, kept, ours = pair
    reading, writing = os.pipe()
    keepsake.give(writing)
    os.close(writing)
    ours.close()
    assert not kept.receive()
    assert not _ended(reading), "until it is known that nobody needs it"
    kept.close()
    assert _ended(reading)
    os.close(reading)


def test_a_keeper_that_does_not_listen_holds_nobody_up(pair: Pair) -> None:
    keepsake, kept, _ = pair
    pipes = [os.pipe() for _ in range(400)]
    for _, writing in pipes:
        keepsake.give(writing)
    for _, writing in pipes:
        keepsake.take_back(writing)
        os.close(writing)
    for _ in range(400):
        assert kept.receive()
        keepsake.tell()
    assert kept.receive()
    assert len(kept) == 0
    assert all(_ended(reading) for reading, _ in pipes)
    for reading, _ in pipes:
        os.close(reading)


def test_a_number_that_is_given_again_is_that_of_the_new_one(pair: Pair) -> None:
    keepsake, kept, ours = pair
    (old, descriptor), (new, other) = os.pipe(), os.pipe()
    keepsake.give(descriptor)
    told = 0
    try:
        while True:
            ours.send(b"-999999")
            told += 1
    except BlockingIOError:
        keepsake.take_back(descriptor)
    os.dup2(other, descriptor)
    os.close(other)
    while told >= 0:
        assert kept.receive()
        told -= 1
    keepsake.give(descriptor)
    assert kept.receive()
    os.close(descriptor)
    assert _ended(old)
    assert not _ended(new)
    for reading in (old, new):
        os.close(reading)


def test_without_a_keeper(pair: Pair) -> None:
    Keepsake(None).give(0)
    keepsake, kept, _ = pair
    kept.close()
    keepsake.give(0)
    keepsake.take_back(0)
    keepsake.tell()
