"""Processes: their identity across pid reuse, pidfds, subreapers, signals at a parent's death."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from pathlib import Path

from relume.linux import proc, syscall

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_PF_EXITING = 0x4
"""include/linux/sched.h; in field 9 of proc_pid_stat(5)."""


def start_time(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot (proc_pid_stat(5), field 22); None if it is gone.

    (pid, start time) names a process for the life of the machine; a pid alone does not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def exiting(pid: int) -> bool:
    """Whether ``pid`` is gone, or as good as: a zombie, or past its last instruction (PF_EXITING).

    The first process of a pid namespace exits for as long as others in there are not reaped.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    fields = stat[stat.rindex(b")") + 2 :].split()
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


def traced(pid: int) -> bool:
    """Whether a tracer has hold of ``pid`` (proc_pid_status(5), TracerPid)."""
    return _status(pid, "TracerPid") not in (None, "0")


def alive(pid: int, started: int) -> bool:
    """Whether the process that was ``pid`` and started then still runs."""
    return start_time(pid) == started


async def ended(pid: int) -> None:
    """Return when the process has ended, at once if it is no more (pidfd_open(2): readable then)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def inner_pid(pid: int) -> int | None:
    """The pid that ``pid`` has in its innermost pid namespace (proc_pid_status(5), NSpid)."""
    pids = _status(pid, "NSpid")
    return int(pids.split()[-1]) if pids else None


def name(pid: int) -> str:
    """What ps shows as its command; a zombie still has it. Empty when it is gone."""
    return _status(pid, "Name") or ""


def send(pid: int, number: signal.Signals) -> None:
    """kill(2) that does not mind when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def become_subreaper() -> None:
    """Orphans among our descendants become our children (prctl(2)), so their exit status is ours to read."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Get ``number`` when the thread that made us ends. End at once if ``parent``, its process, has ended already."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # killed between its fork and our request: nothing would be sent any more
        os._exit(1)


def set_name(name: str) -> None:
    """What ps and top show as the command (15 bytes)."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    syscall.libc().prctl(_PR_SET_NAME, buffer, 0, 0, 0)


def boot_id() -> str:
    """A random id the kernel makes at each boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _prctl(option: int, value: int) -> None:
    if syscall.libc().prctl(option, value, 0, 0, 0) != 0:
        raise syscall.error(f"prctl {option}")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether ``pid`` has a handler for the signal (proc_pid_status(5), SigCgt)."""
    return bool(int(_status(pid, "SigCgt") or "0", 16) >> (number - 1) & 1)


def _status(pid: int, field: str) -> str | None:
    """A line of proc_pid_status(5); None when the process is gone."""
    try:
        return proc.status_fields(pid).get(field)
    except OSError:
        return None
