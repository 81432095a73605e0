"""What a node needs of the machine before it can run anything, and what it takes away when it goes."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

from relume.errors import Conflict, HostError
from relume.linux import cgroup, resident
from relume.node.places import CGROUP, KDAT_DIRECTORY, RUN, Places

log = logging.getLogger(__name__)

_OF_EVERY_START = ("unshare", "sh", "tar", "pasta")
"""Beside runc and CRIU (relume.engine)."""

_MOUNT_ROOT_S = 3600.0
"""Seconds after which no restore is still going on."""

_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")


def prepare(places: Places, *, allow_userfaultfd: bool) -> bool:
    """Make the runtime directories, CRIU's cache directory and, where allowed, the sysctl for paging.

    Returns whether restored memory can be paged on demand. Raises HostError.
    """
    if os.geteuid() != 0:
        raise HostError("a node needs root", hint="run it with sudo, or by the systemd unit in packaging/")
    if crowded := cgroup.crowded():
        raise HostError(f"no instance could have limits: {crowded}", hint=cgroup.MAKE_ROOM)
    for directory in (RUN, places.runtime):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o711)
    for directory in (places.runc_root, places.verified):
        directory.mkdir(mode=0o700, exist_ok=True)
    for name in ("instances", "persistent", "secrets"):
        (places.state / name).mkdir(mode=0o700, exist_ok=True)
    _prepare_kdat()
    _sweep_mount_roots(Path("/tmp"), time.time())
    return allow_userfaultfd and _allow_userfaultfd()


def keep_in_memory(*engine: Path) -> None:
    """The programs of every start, so that none is read from the disk first. Costs some 30 MB, and a log line."""
    held = resident.hold(resident.programs([*engine, *_OF_EVERY_START]))
    log.info("%.0f MB of programs that every start runs are kept in memory", held / 1e6)


def claim(places: Places) -> int:
    """A descriptor that locks the runtime directory, made by :func:`prepare`, for as long as it is open.

    The state has a lock of its own, but a copy of the state has the same node id: its node would take the
    instances of the first one for its own leftovers. Raises Conflict.
    """
    descriptor = os.open(places.runtime, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(
            f"a node with the id {places.node_id} runs already: {places.state} is a copy of its state",
            hint="stop the other one, or begin with an empty directory as RELUME_STATE and deploy there",
        ) from None
    return descriptor


def _prepare_kdat() -> None:
    """A place where CRIU keeps what it learned of the kernel: 35 - 50 ms off every restore."""
    try:
        KDAT_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        status = KDAT_DIRECTORY.lstat()
        if status.st_uid != 0 or KDAT_DIRECTORY.is_symlink():
            raise HostError(
                f"{KDAT_DIRECTORY} belongs to uid {status.st_uid}, but CRIU trusts what lies in it",
                hint=f"look who made it, remove it, and start the node again: rm -r {KDAT_DIRECTORY}",
            )
        KDAT_DIRECTORY.chmod(0o700)
        # A left-over of a CRIU that was killed while writing; it blocks the cache for ever, without an error.
        (KDAT_DIRECTORY / "criu.kdat.tmp").unlink(missing_ok=True)
    except OSError as error:
        log.warning("no cache for CRIU in %s: %s", KDAT_DIRECTORY, error)


def _sweep_mount_roots(place: Path, now: float) -> None:
    """Empty folders in which a CRIU that was killed had put its mounts together (criu/mount-v2.c), in a mount
    namespace of its own that is gone with it. Only old ones: removing one in use would take its mounts away."""
    for directory in place.glob(".criu.mntns.??????"):
        try:
            if now - directory.lstat().st_mtime > _MOUNT_ROOT_S:
                directory.rmdir()
        except OSError:
            continue


def _allow_userfaultfd() -> bool:
    """Paging into a user namespace needs the sysctl (1 also lets unprivileged processes on the host use it)."""
    try:
        if _USERFAULTFD.read_text().strip() != "1":
            _USERFAULTFD.write_text("1")
            log.warning(
                "set vm.unprivileged_userfaultfd=1 until the next boot; [node] allow_userfaultfd = false leaves it"
            )
    except OSError as error:
        log.warning("restores will be eager, vm.unprivileged_userfaultfd cannot be set: %s", error)
        return False
    return True


def tidy(places: Places) -> None:
    """Take away directories of this node that are empty; a later start makes them again."""
    cgroup.remove(places.cgroup, timeout=0.1)
    shutil.rmtree(places.verified, ignore_errors=True)
    # Other nodes have groups of their own in CGROUP, which may be empty just now.
    for directory in (*cgroup.directories(CGROUP), places.runc_root, places.runtime, RUN):
        try:
            directory.rmdir()
        except OSError:
            continue


def program_version(binary: Path, *arguments: str) -> str:
    """The first line that ``binary ARGUMENTS`` prints. Raises HostError."""
    try:
        answer = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"{binary} does not run: {error}", hint="relume doctor tells more") from None
    return answer.stdout.strip().splitlines()[0]
