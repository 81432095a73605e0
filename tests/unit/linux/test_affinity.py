"""Which processors a thread may run on, by the pid that it has inside."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from relume.linux import affinity

EVERYWHERE = os.sched_getaffinity(0)


@pytest.mark.skipif(len(EVERYWHERE) < 2, reason="one processor: nothing to be kept from")
def test_read_and_apply_by_thread() -> None:
    first = min(EVERYWHERE)
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            assert affinity.read([child.pid]) == []
            os.sched_setaffinity(child.pid, {first})
            found = affinity.read([child.pid, 2**22 - 1])
            assert found == [{"thread": child.pid, "processors": [first]}]
            os.sched_setaffinity(child.pid, EVERYWHERE)
            affinity.apply([child.pid, 2**22 - 1], found)
            assert os.sched_getaffinity(child.pid) == {first}
        finally:
            child.kill()


@pytest.mark.skipif(len(EVERYWHERE) < 2, reason="one processor: nothing to be kept from")
def test_threads_have_their_own() -> None:
    told, done = threading.Event(), threading.Event()
    ids = []

    def run() -> None:
        os.sched_setaffinity(0, {max(EVERYWHERE)})
        ids.append(threading.get_native_id())
        told.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    told.wait()
    try:
        assert affinity.read([os.getpid()]) == [{"thread": ids[0], "processors": [max(EVERYWHERE)]}]
    finally:
        done.set()
        thread.join()


def test_processors_that_are_not_here_change_nothing() -> None:
    affinity.apply([os.getpid()], [{"thread": threading.get_native_id(), "processors": [1000]}])
    assert os.sched_getaffinity(0) == EVERYWHERE
