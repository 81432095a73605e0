"""Processes by pid and start time, and what raw system calls say when they fail."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from relume.linux import process, syscall

_PTRACE_SEIZE = 0x4206
_WALL = 0x40000000


def test_identity_of_a_process(tmp_path: Path) -> None:
    """(pid, start time), whatever the program is called; a zombie is gone."""
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "60"])
    started = process.start_time(child.pid)
    assert started is not None
    assert process.alive(child.pid, started)
    assert not process.alive(child.pid, started - 1)  # the pid was another's
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.start_time(child.pid) is None  # a zombie
    child.wait()
    assert process.start_time(child.pid) is None
    assert not process.alive(child.pid, started)


def test_killed_under_a_tracer() -> None:
    """Nobody hears of the end before the tracer has taken note of each thread, a pidfd neither; /proc tells."""
    code = (
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start();"
        "print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert not process.traced(child.pid)
        threads = [int(each.name) for each in Path(f"/proc/{child.pid}/task").iterdir()]
        for thread in threads:
            assert syscall.libc().ptrace(_PTRACE_SEIZE, thread, None, None) == 0
        assert process.traced(child.pid) and not process.exiting(child.pid)
        pidfd = os.pidfd_open(child.pid)
        child.kill()
        while not process.exiting(child.pid):
            time.sleep(0.01)
        assert process.traced(child.pid)
        assert process.name(child.pid).startswith("python")
        assert not select.select([pidfd], [], [], 0.1)[0], "the kernel tells: the look at /proc is not needed"
        for thread in sorted(threads, reverse=True):
            os.waitpid(thread, _WALL)
        os.close(pidfd)
        assert process.exiting(child.pid) and not process.traced(child.pid)
        assert process.name(child.pid) == ""


def test_a_signal_to_nobody_is_no_error() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    process.send(child.pid, signal.SIGTERM)


def test_catches() -> None:
    """SIGUSR1 is handled, SIGUSR2 ignored, SIGTERM left alone."""
    code = (
        "import signal, sys; signal.signal(signal.SIGUSR1, print);"
        "signal.signal(signal.SIGUSR2, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        caught = [
            process.catches(child.pid, each) for each in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
        ]
        child.kill()
    assert caught == [True, False, False]
    assert not process.catches(child.pid, signal.SIGUSR1)


def _of_an_orphan(code: str, *, until: str = "") -> str:
    """What a subreaper prints whose grandchild ran ``code``: its own name, and the grandchild's status (wait(2)).

    The child in between ends after ``until``; ``parent`` is its pid, and of the pipe ``started`` ``code`` may use.
    """
    program = f"""
import os, signal, time
from relume.linux import process
process.become_subreaper()
process.set_name("a name of more than fifteen bytes")
r, w = os.pipe()
started = os.pipe()
middle = os.fork()
if middle == 0:
    parent = os.getpid()
    inner = os.fork()
    if inner == 0:
        {code}
        time.sleep(60)
    {until}
    os.write(w, inner.to_bytes(4, "little"))
    os._exit(0)
os.waitpid(middle, 0)
_, status = os.waitpid(int.from_bytes(os.read(r, 4), "little"), 0)
print(open("/proc/self/comm").read().strip(), os.waitstatus_to_exitcode(status), sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


def test_subreaper_name_and_death_with_the_parent() -> None:
    """A middle process dies; its child, which asked for it, dies too, and we (a subreaper) get its status."""
    code = "process.die_with_parent(parent, signal.SIGUSR1); os.write(started[1], b'x')"
    said = _of_an_orphan(code, until="os.read(started[0], 1)")
    assert said == f"a name of more|{-signal.SIGUSR1}\n"


def test_a_child_whose_parent_was_faster_ends() -> None:
    """Killed between its fork and the request to die with it: nobody would send a signal any more."""
    code = "[time.sleep(0.01) for _ in iter(lambda: os.getppid() == parent, False)]; process.die_with_parent(parent)"
    assert _of_an_orphan(code) == "a name of more|1\n"


def test_a_failed_call_says_which_file() -> None:
    with pytest.raises(FileNotFoundError) as failed:
        syscall.call(syscall.OPEN_TREE, -100, b"/nowhere", 0, what="/nowhere")
    assert (failed.value.errno, failed.value.filename) == (errno.ENOENT, "/nowhere")


def test_boot_id() -> None:
    assert len(process.boot_id()) == 36
    assert process.boot_id() == process.boot_id()


def test_a_name_with_a_line_of_its_own() -> None:
    """A process writes its name itself, and the kernel escapes but newline and backslash."""
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b'x\\rNSpid:\\t7'); print(1, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    with child:
        child.stdout.readline()
        assert process.inner_pid(child.pid) == child.pid
        assert process.name(child.pid) == "x\rNSpid:\t7"
        child.stdin.close()
