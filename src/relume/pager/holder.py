"""The process that keeps the userfaultfds open when the pager dies, and ends the instance then.

When the last descriptor of a userfaultfd closes, the kernel gives zero pages for whatever is missing: the app
would run on, on zeros. So the pager is not a plain child: it is made with clone(CLONE_FILES) and shares the
holder's table of descriptors. Every userfaultfd the pager receives, those of forked children included (they
come into being with the reading of the event, before the child runs), is the holder's from the same moment.
The holder does nothing but wait. When the pager ends with work left, it kills the instance, and only then
does it let go.

The clone is what os.fork() does (the same hooks, the same tid address for libc), with one flag more. Both
sides run Python on; they share descriptors, not memory. It is made before any thread exists.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from relume.errors import PagerError
from relume.linux import cgroup, process, syscall, userfaultfd

log = logging.getLogger(__name__)

_CLONE_FILES = 0x400
_CLONE_CHILD_CLEARTID = 0x00200000
_CLONE_CHILD_SETTID = 0x01000000
_PR_GET_TID_ADDRESS = 40
_NR_CLONE = {"x86_64": 56, "aarch64": 220}
_KILL_SECONDS = 10.0
_SLOT_BYTES = 1 << 17
_LENGTH = struct.Struct("<I")


class Board:
    """A page of memory that pager and holder share: whom to kill if the pager ends, and why it did.

    Written by any thread of the pager.
    """

    def __init__(self) -> None:
        self._holder = os.getpid()
        self._memory = mmap.mmap(-1, 1 + 2 * _SLOT_BYTES)
        self._lock = threading.Lock()
        self._content: dict[str, object] = {"armed": False, "cgroup": None, "pids": [], "reason": ""}
        self._write()

    def arm(self, group: str | None) -> None:
        """From now on the pager's end is the instance's end."""
        with self._lock:
            self._content |= {"armed": True, "cgroup": group}
            self._write()

    def add(self, pid: int) -> None:
        """One more process of the instance."""
        started = process.start_time(pid)
        with self._lock:
            pids = self._content["pids"]
            assert isinstance(pids, list)
            pids.append([pid, started])
            self._write()

    @property
    def orphaned(self) -> bool:
        """Whether the holder was killed. To be asked by the pager."""
        return os.getppid() != self._holder

    def watch_holder(self) -> int:
        """A descriptor that is readable once the holder has ended (pidfd_open(2)). To be asked by the pager."""
        descriptor = os.pidfd_open(self._holder)
        if self.orphaned:  # and its pid is perhaps another's by now
            os.close(descriptor)
            raise ProcessLookupError("the holder has ended")
        return descriptor

    def disarm(self) -> None:
        """The instance does not need the pager any more."""
        with self._lock:
            self._content["armed"] = False
            self._write()

    def explain(self, reason: str) -> None:
        """Why the pager is about to end; the first reason stays."""
        with self._lock:
            self._content["reason"] = self._content["reason"] or reason[:4000]
            self._write()

    def abandon(self, status: int) -> NoReturn:
        """Ends the pager, with work left. Who kills the instance is the holder; if that is gone too, we are."""
        if self.orphaned:
            armed, group, pids, _ = self.read()
            if armed:
                kill_instance(group, pids)
        os._exit(status)

    def read(self) -> tuple[bool, str | None, list[tuple[int, int]], str]:
        """(armed, group, [(pid, start time)], reason), for the holder, once the pager is gone."""
        start = 1 + self._memory[0] * _SLOT_BYTES
        (length,) = _LENGTH.unpack_from(self._memory, start)
        content = json.loads(self._memory[start + _LENGTH.size : start + _LENGTH.size + length])
        pids = [(pid, started) for pid, started in content["pids"] if started is not None]
        return content["armed"], content["cgroup"], pids, content["reason"]

    def _write(self) -> None:
        """Into the slot that is not in use; then one byte says that it is. The pager may be killed anywhere."""
        encoded = json.dumps(self._content).encode()
        if _LENGTH.size + len(encoded) > _SLOT_BYTES:
            raise PagerError("too many processes in one instance", hint="give the pager a cgroup")
        slot = 1 - self._memory[0]
        start = 1 + slot * _SLOT_BYTES
        _LENGTH.pack_into(self._memory, start, len(encoded))
        start += _LENGTH.size
        self._memory[start : start + len(encoded)] = encoded
        self._memory[0] = slot


def hold(pager: Callable[[Board], int], report: Callable[[str], None]) -> int:
    """Runs ``pager`` in a process that shares our descriptors; returns its exit status once it is over.

    If it ends while armed the instance is killed, then ``report`` gets the reason, and 1 is returned.
    """
    board = Board()
    # A signal to the whole group ends the pager; we are there for what comes after.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = clone_sharing_files()
    if child == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        status = 70
        try:
            process.set_name("relume-pager")
            status = pager(board)
        except BaseException as error:
            board.explain(f"{type(error).__name__}: {error}")
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            board.abandon(status)
    process.set_name("relume-holder")
    _, ended = os.waitpid(child, 0)
    armed, group, pids, reason = board.read()
    if not armed:
        return os.waitstatus_to_exitcode(ended)
    kill_instance(group, pids)
    code = os.waitstatus_to_exitcode(ended)
    report(
        reason or (f"the pager was killed by signal {-code}" if code < 0 else f"the pager ended with {code}")
    )
    return 1


def clone_sharing_files() -> int:
    """Like os.fork(), but both processes go on with one table of descriptors. Raises PagerError, OSError."""
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise PagerError("the pager must be made before any thread exists", hint="a caller's mistake")
    libc = ctypes.PyDLL(None, use_errno=True)  # keeps the GIL, as os.fork() does
    libc.syscall.restype = ctypes.c_long
    tid_address = ctypes.c_void_p()
    if libc.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(tid_address), 0, 0, 0) != 0:
        raise syscall.error("prctl PR_GET_TID_ADDRESS")
    flags = _CLONE_FILES | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID | signal.SIGCHLD
    machine = os.uname().machine
    # clone(flags, stack, parent_tid, child_tid, tls) on x86; tls comes before child_tid elsewhere (clone(2)).
    last = (tid_address, None) if machine == "x86_64" else (None, tid_address)
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = int(libc.syscall(ctypes.c_long(_NR_CLONE[machine]), ctypes.c_ulong(flags), None, None, *last))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise syscall.error("clone")
    return pid


def kill_instance(group: str | None, pids: list[tuple[int, int]]) -> None:
    """SIGKILL to the group, or to the processes and what they made; returns when none of them is left.

    Without a group, descendants, sessions and process groups tell what belongs together. Whoever escapes that
    (a daemon with a session of its own) stands still at its next missing page, as long as this process lives.
    """
    delay = 0.002
    while True:
        if group is not None:
            cgroup.kill(group, timeout=_KILL_SECONDS)
        family = _family(pids)
        for pid in family:
            process.send(pid, signal.SIGKILL)
        if not family and not any(map(userfaultfd.alive, _userfaultfds())):
            return
        time.sleep(delay)
        delay = min(2 * delay, 1.0)


def _userfaultfds() -> list[int]:
    """The descriptors of this process that are userfaultfds."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if str(entry.readlink()) == "anon_inode:[userfaultfd]":
                found.append(int(entry.name))
        except FileNotFoundError:
            continue
    return found


def _family(pids: list[tuple[int, int]]) -> set[int]:
    """The living among ``pids``, their descendants, and all in sessions and process groups that they lead."""
    roots = {pid for pid, started in pids if process.start_time(pid) in (started, None)}
    found = {pid for pid, started in pids if process.alive(pid, started)}
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_bytes()
        except OSError:
            continue
        pid = int(entry.name)
        # After the command: state, ppid, pgrp, session (proc_pid_stat(5)).
        state, parent, leader, session = stat[stat.rindex(b")") + 2 :].split()[:4]
        if state in (b"Z", b"X"):
            continue
        parents[pid] = int(parent)
        if int(leader) in roots or int(session) in roots:
            found.add(pid)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        found |= more
        grown = bool(more)
    return found - {os.getpid(), os.getppid()}
