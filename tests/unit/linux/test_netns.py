"""A thread inside a namespace. Its own namespace needs no privilege to be looked at; entering one does."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from relume.linux import netns, syscall


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> netns.Inside:
    """In this process's own namespace: setns(2) wants a capability even for that."""

    class Libc:
        def setns(self, namespace: int, kind: int) -> int:
            return 0

    monkeypatch.setattr(syscall, "libc", Libc)
    return netns.Inside(-1)


def test_work_runs_in_one_thread_that_is_not_ours(inside: netns.Inside) -> None:
    threads = {inside.run(threading.get_ident) for _ in range(3)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    inside.close()


def test_errors_come_back_and_the_thread_goes_on(inside: netns.Inside) -> None:
    def fail() -> None:
        raise ConnectionRefusedError("no")

    with pytest.raises(ConnectionRefusedError):
        inside.run(fail)
    assert inside.run(lambda: 1) == 1
    inside.close()


def test_after_close_it_refuses_instead_of_waiting_for_ever(inside: netns.Inside) -> None:
    inside.close()
    with pytest.raises(OSError, match="left"):
        inside.run(lambda: 1)


def test_a_namespace_that_cannot_be_entered() -> None:
    with pytest.raises(OSError, match="setns"):
        netns.Inside(-1)


def test_sockets_never_block_and_no_child_inherits_them() -> None:
    listener = netns.listener("127.0.0.1", 0, backlog=8)
    client = netns.stream_socket()
    for made in (listener, client):
        assert not made.getblocking()
        assert not os.get_inheritable(made.fileno())
    client.setblocking(True)
    client.connect(listener.getsockname())
    client.close()
    listener.close()
    with netns.stream_socket(socket.AF_INET6) as sixth:
        assert sixth.family is socket.AF_INET6


def test_the_namespace_of_a_process() -> None:
    descriptor = netns.open_of(os.getpid())
    assert os.fstat(descriptor).st_ino == Path("/proc/self/ns/net").stat().st_ino
    os.close(descriptor)
