"""Control groups, version 1 (one tree per controller, the hybrid layout included) and version 2.

A group is named by its path below the root, e.g. ``/relume/NODE/INSTANCE``, and may exist in several
hierarchies at once (v1). Functions here act on all of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Collection
from functools import cache
from pathlib import Path

from relume.linux import mounts

ROOT = Path("/sys/fs/cgroup")

MAKE_ROOM = (
    "in this container, before the node: cd /sys/fs/cgroup && mkdir -p init && for pid in $(cat cgroup.procs); do "
    "echo $pid > init/cgroup.procs; done; echo '+cpu +memory +pids' > cgroup.subtree_control"
)

_MS_REMOUNT = 32
_MOUNT_FLAGS = {
    "rw": 0,
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "noatime": 1 << 10,
    "relatime": 1 << 21,
}


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


def crowded(wanted: Collection[str] = ("memory", "cpu", "pids")) -> str:
    """Why no group of ours can have the controllers ``wanted``, in a container with version 2; else empty.

    The root of a cgroup namespace is a group like any other: as long as processes are in it, those below it get no
    controllers (cgroups(7), "no internal processes").
    """
    if not unified() or not (ROOT / "cgroup.type").exists():  # the real root has none
        return ""
    missing = set(wanted) - set((ROOT / "cgroup.subtree_control").read_text().split())
    if not missing or not (ROOT / "cgroup.procs").read_text().strip():
        return ""
    return f"processes lie in {ROOT} itself, which keeps {', '.join(sorted(missing))} from the groups below"


@cache
def options() -> tuple[str, ...]:
    """The options of version 2 itself (``nsdelegate`` and the like) at the first call; empty where it has none."""
    return _mounted()[1]


def keep_options() -> None:
    """Give version 2 the options back that it had at the first call of ``options``. Never raises.

    The kernel has one set of them for all mounts, and takes it from the latest that is made outside of a cgroup
    namespace (cgroup_get_tree). CRIU mounts the hierarchy for a moment at each dump and restore, without any, and the
    whole host's memory.min and delegation hang on them (moby #50466 met the same).
    """
    if not options():
        return
    root, now, flags = _mounted()
    if root is not None and not set(options()) <= set(now):
        with contextlib.suppress(OSError):
            mounts.mount("cgroup2", root, None, _MS_REMOUNT | flags, ",".join(options()))


def _mounted() -> tuple[Path | None, tuple[str, ...], int]:
    """Version 2's first mount: where, its own options, and the flags of this mount (mount(2))."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, listed, *_ = line.split(" ")
        if kind == "cgroup2":
            words = listed.split(",")
            flags = sum(_MOUNT_FLAGS.get(word, 0) for word in words)
            return Path(target), tuple(word for word in words if word not in _MOUNT_FLAGS), flags
    return None, (), 0


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
