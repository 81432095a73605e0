"""The holder: shares descriptors with the pager, and what it does when the pager ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relume.images.files import write_image
from relume.images.proto import pstree_pb2
from relume.pager import holder

ROOT = Path(__file__).parents[3]

SCRIPT = """
import os, sys, signal
from relume.pager.holder import hold
mode, victim = sys.argv[1], int(sys.argv[2])
def pager(board):
    board.arm(None)
    board.add(victim)
    # Opened here, after the clone: the holder must have it too.
    os.dup2(os.open("/dev/zero", os.O_RDONLY), 77)
    if mode == "complete":
        board.disarm()
        return 0
    if mode == "error":
        raise ValueError("bad page")
    if mode == "explained":
        board.explain("the disk fails")
        return 3
    os.kill(os.getpid(), signal.SIGKILL)
def report(reason):
    print(reason, os.path.exists("/proc/self/fd/77"), flush=True)
sys.exit(hold(pager, report))
"""


def _run(mode: str) -> tuple[int, str, bool]:
    """(exit status, what the holder reported, whether the instance is alive)."""
    victim = subprocess.Popen(["sleep", "60"])
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode, str(victim.pid)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
            timeout=20,
        )
        return done.returncode, done.stdout.strip(), victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_a_killed_pager_ends_the_instance_while_its_descriptors_stay() -> None:
    assert _run("killed") == (1, "the pager was killed by signal 9 True", False)


def test_an_error_ends_the_instance() -> None:
    assert _run("error") == (1, "ValueError: bad page True", False)


def test_the_reason_is_the_pagers() -> None:
    assert _run("explained") == (1, "the disk fails True", False)


def test_a_complete_instance_lives_on() -> None:
    assert _run("complete") == (0, "", True)


def test_a_pager_that_is_not_needed_ends_quietly() -> None:
    ours, theirs = socket.socketpair()
    process = _start(theirs)
    ours.close()
    assert process.wait(20) == 0


def test_images_that_are_not_there(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    process = _start(theirs)
    with ours:
        ours.sendall(json.dumps({"images": str(tmp_path), "work_dir": str(tmp_path)}).encode() + b"\n")
        received = b""
        while part := ours.recv(4096):
            received += part
        events = [json.loads(line) for line in received.splitlines()]
    assert [event["event"] for event in events] == ["listening", "failed"]
    assert "pstree.img" in events[-1]["reason"]
    assert process.wait(20) == 1


def test_a_keeper_that_is_killed_before_criu_came_leaves_nobody_behind(tmp_path: Path) -> None:
    write_image(
        tmp_path / "pstree.img", [pstree_pb2.pstree_entry(pid=1, ppid=0, pgid=1, sid=1)], kind="PSTREE"
    )
    ours, theirs = socket.socketpair()
    process = _start(theirs)
    try:
        with ours:
            ours.sendall(json.dumps({"images": str(tmp_path), "work_dir": str(tmp_path)}).encode() + b"\n")
            assert b"listening" in ours.recv(4096)
        assert process.wait(20) == 1
    finally:
        for pid in map(int, _children(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.wait(20)


def test_the_board_is_written_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    board, writing, twice = holder.Board(), threading.Lock(), []
    encode = json.dumps

    def slow(content: object) -> str:
        if not writing.acquire(blocking=False):
            twice.append(content)
            return encode(content)
        threading.Event().wait(0.1)
        writing.release()
        return encode(content)

    monkeypatch.setattr(holder.json, "dumps", slow)
    threads = [threading.Thread(target=board.explain, args=(reason,)) for reason in ("first", "second")]
    threads.append(threading.Thread(target=board.add, args=(os.getpid(),)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not twice
    _, _, pids, reason = board.read()
    assert [pid for pid, _ in pids] == [os.getpid()]
    assert reason == "first"


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []  # it has ended


def _start(control: socket.socket) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "relume.pager", "--control", str(control.fileno())],
        pass_fds=[control.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.DEVNULL,
    )
    control.close()
    return process
