"""Control groups, version 1 (one tree per controller, the hybrid layout included) and version 2.

A group is named by its path below the root, e.g. ``/relume/NODE/INSTANCE``, and may exist in several
hierarchies at once (v1). Functions here act on all of them.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from functools import cache
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@cache
def unified() -> bool:
    """Whether /sys/fs/cgroup is one version 2 tree (cgroups(7)); the hybrid layout counts as version 1."""
    return (ROOT / "cgroup.controllers").exists()


@cache
def hierarchies() -> tuple[Path, ...]:
    """The mount point of every hierarchy a group may appear in."""
    if unified():
        return (ROOT,)
    found = []
    with open("/proc/self/mountinfo") as table:
        for line in table:
            fields, _, rest = line.partition(" - ")
            if rest.split(" ", 1)[0] in ("cgroup", "cgroup2"):
                found.append(Path(fields.split(" ")[4]))
    return tuple(found)


def directories(group: str) -> list[Path]:
    """The directories in which ``group`` exists. Raises ValueError for the root: it is everybody's."""
    relative = group.strip("/")
    if not relative or ".." in relative.split("/"):
        raise ValueError(f"not a group of ours: {group!r}")
    return [path for root in hierarchies() if (path := root / relative).is_dir()]


def processes(group: str) -> list[int]:
    """Host pids in ``group`` and the groups below it, sorted."""
    pids: set[int] = set()
    for directory in directories(group):
        for parent, _, _ in os.walk(directory):
            try:
                pids.update(int(pid) for pid in Path(parent, "cgroup.procs").read_text().split())
            except OSError:
                continue  # removed between the walk and the read
    return sorted(pids)


def elsewhere(pid: int, group: str) -> bool:
    """Whether a process is in no hierarchy's ``group``, nor below it; False for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # As seen from our own cgroup namespace, or, in a container without one, with that container's path before it.
    return not any(f"{group}/" in f"{line.partition(' (deleted)')[0]}/" for line in lines)


def kill(group: str, *, timeout: float = 5.0) -> None:
    """SIGKILL every process in ``group`` until none is left (``timeout`` seconds at most); thaws first.

    A v1-frozen task takes no signal, SIGKILL included, until it is thawed.
    """
    deadline = time.monotonic() + timeout
    while True:
        pids = processes(group)
        if not pids or time.monotonic() > deadline:
            return
        for directory in directories(group):
            if (directory / "cgroup.kill").exists():
                _write(directory / "cgroup.kill", "1")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        thaw(group)
        time.sleep(0.005)


def thaw(group: str) -> None:
    """Let a frozen ``group`` run; nothing happens to one that runs."""
    for directory in directories(group):
        for name, value in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            if (directory / name).exists():
                _write(directory / name, value)


def freeze(group: str) -> None:
    """Stop ``group``; returns at once, the kernel stops its tasks one by one."""
    for directory in directories(group):
        for name, value in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
            if (directory / name).exists():
                _write(directory / name, value)


def remove(group: str, *, timeout: float = 2.0) -> None:
    """Remove ``group`` everywhere, the groups below it first. Processes still in it keep it: kill first.

    rmdir answers EBUSY for a moment after the last process died, hence the patience.
    """
    deadline = time.monotonic() + timeout
    while True:
        left = 0
        for directory in directories(group):
            for parent, _, _ in os.walk(directory, topdown=False):
                try:
                    os.rmdir(parent)
                except FileNotFoundError:
                    continue
                except OSError:
                    left += 1
        if not left or time.monotonic() > deadline:
            return
        time.sleep(0.01)


def memory(group: str) -> tuple[int, int | None]:
    """(bytes charged now, limit in bytes or None) of ``group``; (0, None) when there is none."""
    for directory in directories(group):
        for used, limit in (
            ("memory.current", "memory.max"),
            ("memory.usage_in_bytes", "memory.limit_in_bytes"),
        ):
            try:
                text = (directory / limit).read_text().strip()
                charged = int((directory / used).read_text())
            except OSError:
                continue  # of the other version, or the group went away
            return charged, None if text == "max" or int(text) >= 1 << 60 else int(text)
    return 0, None


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return  # the group went away, which is what every caller wants anyway
        raise OSError(error.errno, error.strerror, str(path)) from None
