"""Descriptors that a third process keeps: for as long as the pager has them, and longer if it is killed."""

from __future__ import annotations

import os
import socket

from relume.pager.keepsake import Keepsake, Kept


def _pair() -> tuple[Keepsake, Kept, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Keepsake(ours), Kept(theirs), ours


def _ended(reading: int) -> bool:
    """Whether the other end of a pipe is closed everywhere."""
    os.set_blocking(reading, False)
    try:
        return os.read(reading, 1) == b""
    except BlockingIOError:
        return False


def test_what_is_given_stays_open_until_it_is_taken_back() -> None:
    keepsake, kept, _ = _pair()
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


def test_it_outlives_the_giver() -> None:
    keepsake, kept, ours = _pair()
    reading, writing = os.pipe()
    keepsake.give(writing)
    os.close(writing)
    ours.close()
    assert not kept.receive()
    assert not _ended(reading), "until it is known that nobody needs it"
    kept.close()
    assert _ended(reading)
    os.close(reading)


def test_a_keeper_that_does_not_listen_holds_nobody_up() -> None:
    keepsake, kept, _ = _pair()
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


def test_without_a_keeper() -> None:
    Keepsake(None).give(0)
    keepsake, kept, _ = _pair()
    kept.close()
    keepsake.give(0)
    keepsake.take_back(0)
    keepsake.tell()
