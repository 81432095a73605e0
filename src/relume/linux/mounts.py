"""Mounts: plain, overlay, and id-mapped binds.

An id-mapped bind shows a directory with every owner shifted into a user namespace's range, without touching
a byte on disk (mount_setattr(2), MOUNT_ATTR_IDMAP; ext4, xfs, btrfs and tmpfs can). So one 0-based layer
serves every app, whatever id range the app has.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

from relume.linux import process, syscall

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

MNT_DETACH = 2

_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_IDMAP = 0x100000


def mount(source: str, target: Path, fstype: str | None = None, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    if (
        syscall.libc().mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            os.fsencode(data) if data else None,
        )
        != 0
    ):
        raise syscall.error(f"{fstype or 'bind'} on {target} ({data or source})")


def unmount(target: Path, *, lazy: bool = True) -> None:
    """umount2(2); lazily by default, so that a straggler's open file does not keep our directory."""
    if syscall.libc().umount2(os.fsencode(target), MNT_DETACH if lazy else 0) != 0:
        raise syscall.error(str(target))


def under(directory: Path) -> list[Path]:
    """Mount points at or below ``directory``, deepest first (the order to unmount them in)."""
    prefix = str(directory)
    found = [
        point for point in points() if str(point) == prefix or str(point).startswith(prefix.rstrip("/") + "/")
    ]
    return sorted(found, key=lambda point: len(point.parts), reverse=True)


def unmount_all(directory: Path) -> None:
    """Unmount everything at or below ``directory``; what somebody else unmounts meanwhile is no error."""
    for point in under(directory):
        try:
            unmount(point)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # umount(2): not a mount point (any more)
                raise


def points() -> Iterator[Path]:
    """Every mount point of this mount namespace (proc_pid_mountinfo(5), field 5)."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            yield Path(os.fsdecode(_unescape(line.split(b" ", 5)[4])))


def _unescape(field: bytes) -> bytes:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    return field.decode("unicode_escape").encode("latin-1") if b"\\" in field else field


def user_namespace(base: int, count: int = 65536, *, groups: int | None = None) -> int:
    """A descriptor of a new user namespace in which id 0 is ``base`` outside, ``count`` ids long.

    ``groups`` is the same for group ids, where it differs. Nobody lives in it: the process that made it is
    gone, the descriptor keeps it. Close it after use.
    """
    ready_r, ready_w = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:  # only async-signal-safe work here: the parent may have threads
        try:
            if syscall.libc().unshare(0x10000000) == 0:  # CLONE_NEWUSER
                # After it: a change of credentials forgets the signal (prctl(2)).
                process.die_with_parent(parent)
                os.write(ready_w, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(ready_w)
    try:
        if os.read(ready_r, 1) != b"1":
            raise OSError("no user namespace can be made (see `relume doctor`)")
        for name, outside in (("uid_map", base), ("gid_map", base if groups is None else groups)):
            Path(f"/proc/{child}/{name}").write_text(f"0 {outside} {count}\n")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_r)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def bind_idmapped(source: Path, target: Path, userns: int, *, readonly: bool) -> None:
    """Bind ``source`` on ``target`` with its owners shifted by ``userns`` (a descriptor).

    Must start from a plain mount: a clone of one that is already id-mapped answers EPERM, and an attached
    mount EINVAL, so the tree is cloned, changed while detached, and then moved into place.
    """
    tree = syscall.call(
        syscall.OPEN_TREE,
        _AT_FDCWD,
        os.fsencode(source),
        _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC,
        what=str(source),
    )
    try:
        set_bits = _MOUNT_ATTR_IDMAP | (_MOUNT_ATTR_RDONLY if readonly else 0)
        attributes = struct.pack("QQQQ", set_bits, 0, MS_PRIVATE, userns)
        syscall.call(
            syscall.MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes), what=str(source)
        )
        syscall.call(
            syscall.MOVE_MOUNT,
            tree,
            b"",
            _AT_FDCWD,
            os.fsencode(target),
            _MOVE_MOUNT_F_EMPTY_PATH,
            what=str(target),
        )
    finally:
        os.close(tree)


def overlay(lower: list[Path], upper: Path, work: Path, target: Path, *, options: str = "") -> None:
    """Mount an overlay; ``lower`` is ordered bottom first (the kernel wants top first). Any path will do.

    ``index=on,nfs_export=on`` gives files handles, without which CRIU cannot save an inotify watch.
    """
    stacked = ":".join(_escape(path).replace(":", r"\:") for path in reversed(lower))
    data = f"lowerdir={stacked},upperdir={_escape(upper)},workdir={_escape(work)}"
    mount("overlay", target, "overlay", 0, data + (f",{options}" if options else ""))


def _escape(path: Path) -> str:
    """A path as overlay wants it among its options: commas and backslashes behind a backslash."""
    return str(path).replace("\\", r"\\").replace(",", r"\,")
