"""What preflight says of real processes. The same against CRIU itself: tests/e2e/engine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.engine import preflight
from relume.linux import proc

PRELUDE = """
import ctypes, mmap, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
"""

# exit(2), which ends this thread alone, has another number on other machines.
PTHREAD_EXIT = """
threading.Thread(target=time.sleep, args=(100,)).start()
print("ready", flush=True)
libc.syscall(60, 0)
"""


@contextlib.contextmanager
def running(program: str, *, end: str = "print('ready', flush=True); time.sleep(100)") -> Iterator[int]:
    """The pid of a process that has come to say "ready", or the number of another one."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{PRELUDE}{program}\n{end}"], stdout=subprocess.PIPE, start_new_session=True
    )
    with child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"ready\n"
            yield child.pid
        finally:
            os.killpg(child.pid, 9)


def until_state(pid: int, state: str) -> None:
    deadline = time.monotonic() + 10
    while proc.status(pid).state != state:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("first", [True, False], ids=["the container's first", "another"])
def test_a_main_thread_that_ended_before_others(first: bool) -> None:
    with running("pass") as other, running(PTHREAD_EXIT, end="") as pid:
        until_state(pid, "Z")
        (culprit,) = preflight.examine([pid] if first else [other, pid], rootfs=Path("/"))
        assert culprit.pid == proc.status(pid).pids[0]
        assert "its main thread has ended (pthread_exit in main)" in culprit.what
        assert culprit.hint == "let main wait for its threads"


def test_a_zombie_is_no_obstacle_nor_is_one_that_is_about_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    zombie = subprocess.Popen(["true"])
    until_state(zombie.pid, "Z")
    with running("pass") as other:
        assert preflight.examine([other, zombie.pid], rootfs=Path("/")) == []
        looks = [[zombie.pid + 1], []]  # a thread that ends between the two looks
        monkeypatch.setattr(proc, "threads_going_on", lambda pid: looks.pop(0))
        assert preflight.examine([other, zombie.pid], rootfs=Path("/")) == []
        assert looks == []
    zombie.wait()


def test_pidfds_of_the_containers_own_processes() -> None:
    forked = """
pids = [os.fork() for _ in range(1)]
if pids[0] == 0: time.sleep(100)
ended = os.fork()
if ended == 0: os._exit(0)
os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
fds = [os.pidfd_open(pid) for pid in (pids[0], ended, os.getpid())]
"""
    with running(forked) as pid:  # its children are not in the list, as if they had come since
        assert len([link for _, link in proc.descriptors(pid) if "pidfd" in link]) == 3
        assert preflight.examine([pid], rootfs=Path("/")) == []


def test_a_pidfd_of_a_process_outside() -> None:
    with running("fd = os.pidfd_open(os.getppid())") as pid:
        (culprit,) = preflight.examine([pid], rootfs=Path("/"))
        assert culprit.what == "holds a pidfd of a process outside of the container"


def test_a_pidfd_of_a_process_that_went_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    fdinfo = proc.fdinfo
    with running("fd = os.pidfd_open(os.getpid())") as pid:
        for number in (gone.pid, -1):
            monkeypatch.setattr(
                proc,
                "fdinfo",
                lambda *of, number=number: fdinfo(*of).replace(f"\nPid:\t{pid}", f"\nPid:\t{number}"),
            )
            assert preflight.examine([pid], rootfs=Path("/")) == []


MAPPED = """
file = open({path!r}, "wb+")
file.write(bytes(2 << 20))
file.flush()
assert libc.mmap(None, 2 << 20, mmap.PROT_READ, {flag}, file.fileno(), 0) not in (None, 2**64 - 1)
os.unlink({path!r})
"""


@pytest.mark.parametrize("flag", ["mmap.MAP_SHARED", "mmap.MAP_PRIVATE"])
def test_a_large_deleted_file_that_is_only_mapped(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "large")
    with running(MAPPED.format(path=path, flag=flag) + "file.close()") as pid:
        assert preflight.examine([pid], rootfs=Path("/")) == []
        monkeypatch.setattr(preflight, "GHOST_LIMIT", 1 << 20)
        (culprit,) = preflight.examine([pid], rootfs=Path("/"))
        assert culprit.what.startswith(f"holds the deleted file {path} of 2")
        assert culprit.what.endswith(f" bytes; the limit is {1 << 20} bytes")


def test_a_large_deleted_file_that_is_open_and_mapped_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "GHOST_LIMIT", 1 << 20)
    path = str(tmp_path / "large")
    with running(MAPPED.format(path=path, flag="mmap.MAP_SHARED")) as pid:
        assert len(preflight.examine([pid], rootfs=Path("/"))) == 1


def test_memory_without_a_file_is_no_deleted_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "GHOST_LIMIT", 1 << 20)
    shared = "memory = mmap.mmap(-1, 2 << 20); memory.write(bytes(2 << 20))\n"
    memfd = "fd = os.memfd_create('m'); os.write(fd, bytes(2 << 20)); other = mmap.mmap(fd, 2 << 20); os.close(fd)"
    with running(shared + memfd) as pid:
        assert {"/dev/zero (deleted)", "/memfd:m (deleted)"} <= set(proc.mapped(pid))
        assert preflight.examine([pid], rootfs=Path("/")) == []


def test_what_is_unmapped_meanwhile_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running("pass") as pid:
        monkeypatch.setattr(proc, "mapped", lambda pid: {f"{tmp_path}/large (deleted)": "1000-2000"})
        assert preflight.examine([pid], rootfs=Path("/")) == []
