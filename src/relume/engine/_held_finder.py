"""What processes hold in the root file system of their container, as /proc tells it.

Held is: open in any way, mapped, the working or root directory, the executable, the name of a bound unix
socket, and what an inotify watch looks at. Only the container's root mount counts: what lies on a tmpfs
(``/dev/shm`` among them) CRIU dumps whole, what lies on a bind mount is outside and stays there.

Not seen: files whose only holder is a descriptor in flight in a unix socket (SCM_RIGHTS), and memory locks
of the kernel that show no name.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from relume.linux import files, proc, syscall

_PIDFD_GETFD = 438
_CHANGED = frozenset({errno.ENOENT, errno.ESRCH, errno.EBADF, errno.ENOTTY, errno.EINVAL})
_SIOCUNIXFILE = 0x89E0  # unix(7): a descriptor of the file that a bound socket has


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A path from the container's root, no slash in front ("" is the root); who holds it, and how.

    ``deleted`` when the kernel says that the name is gone. ``locked`` when a record or file lock is on it.
    """

    path: str
    pid: int
    process: str
    how: str
    deleted: bool = False
    locked: bool = False


class Finder:
    """One pass over some processes. ``rootfs`` is where the container's root is mounted out here.

    After it ``sockets`` has the unix sockets whose name is not the one that was bound, by the inode number of the
    socket: supervisord makes a hard link and removes that one, HAProxy renames it. ``misnamed`` are those of them
    that were bound by a relative name, which CRIU cannot save.
    """

    def __init__(self, rootfs: Path) -> None:
        self.sockets: dict[int, str] = {}
        self.misnamed: list[Held] = []
        self._rootfs = rootfs
        self._init = 0
        self._roots: dict[int, proc.Mount] = {}
        self._sockets: dict[int, dict[int, str]] = {}
        self._found: dict[tuple[str, str], Held] = {}

    def find(self, pids: Iterable[int]) -> list[Held]:
        """What they hold, each path once a way. A process that is gone, or a zombie, holds nothing.

        They may run meanwhile: what one closes under our hands is not held.
        """
        statuses = {}
        for pid in pids:
            with contextlib.suppress(*proc.GONE):
                statuses[pid] = proc.status(pid)
        # The container's first process first: another may have changed its root to where something is mounted.
        for pid in sorted(statuses, key=lambda pid: statuses[pid].inside):
            self._init = self._init or pid
            with contextlib.suppress(*proc.GONE):
                self._process(pid, statuses[pid])
        return list(self._found.values())

    def _process(self, pid: int, status: proc.Status) -> None:
        who = (status.inside, status.name)
        space = proc.namespace(pid, "mnt")
        if space not in self._roots:
            self._roots[space] = proc.root_mount(pid)
        root = self._roots[space]
        for name, how in (("cwd", "working directory"), ("root", "root directory"), ("exe", "executable")):
            with _unless_changed():
                if _mount_of(f"/proc/{pid}/{name}") == root.mnt_id:
                    self._add(proc.link(pid, name), who, how)
        for fd, target in proc.descriptors(pid):
            with _unless_changed():
                if target.startswith("/"):
                    self._file(pid, fd, target, who, root)
                elif target.startswith("socket:["):
                    self._socket(pid, fd, int(target[8:-1]), who, root)
                elif target == "anon_inode:inotify":
                    self._watches(proc.fdinfo(pid, fd), who, root)
        for name, span in proc.mapped(pid).items():
            if not name.startswith("/") or (name, "mapped") in self._found:
                continue
            if _mount_of(f"/proc/{pid}/map_files/{span}") == root.mnt_id:
                self._add(name, who, "mapped")

    def _file(self, pid: int, fd: int, target: str, who: tuple[int, str], root: proc.Mount) -> None:
        known = self._found.get((target, "open"))
        if known is not None and (known.locked or not target.endswith("-shm")):
            return
        info = proc.fdinfo(pid, fd)
        if proc.mount_id(info) == root.mnt_id:
            self._add(target, who, "open", locked="\nlock:" in info)

    def _socket(self, pid: int, fd: int, inode: int, who: tuple[int, str], root: proc.Mount) -> None:
        space = proc.namespace(pid, "net")
        if space not in self._sockets:
            named = (socket for socket in proc.unix_sockets(pid) if socket.path and socket.path[0] != "@")
            self._sockets[space] = {socket.inode: socket.path for socket in named}
        # Connections that a listener accepted carry its name too; taking the name out does each once.
        name = self._sockets[space].pop(inode, "")
        if not name or (name.startswith("/") and (name, "bound socket") in self._found):
            return
        # The name is as given to bind(2): relative, or below a chroot. Only the socket's own file is sure.
        process = os.pidfd_open(pid)
        try:
            socket = syscall.call(_PIDFD_GETFD, process, fd, 0, what=f"/proc/{pid}/fd/{fd}")
        finally:
            os.close(process)
        try:
            file = fcntl.ioctl(socket, _SIOCUNIXFILE)
        except FileNotFoundError:
            return
        finally:
            os.close(socket)
        try:
            target = proc.link(os.getpid(), f"fd/{file}")
            bound_as = target.removesuffix(proc.DELETED)
            if target != bound_as:
                with contextlib.closing(_Root(self._init)) as everything:
                    target = everything.other_name(bound_as, file) or target
            if not target.endswith(proc.DELETED):
                with contextlib.closing(_Root(pid)) as seen:  # it may have changed its root
                    if not seen.leads_to(name, file, target):
                        self.sockets[inode] = target
            if not name.startswith("/") and os.path.basename(name) != os.path.basename(bound_as):
                self.misnamed.append(Held(name, who[0], who[1], f"the unix socket {target}"))
            if proc.mount_id(proc.fdinfo(os.getpid(), file)) == root.mnt_id:
                self._add(target, who, "bound socket")
        finally:
            os.close(file)

    def _watches(self, info: str, who: tuple[int, str], root: proc.Mount) -> None:
        prefix = str(self._rootfs).rstrip("/")
        for fields in _watches_on(root.device, info):
            path = _by_handle(self._rootfs, fields)
            if path is not None and path.startswith(prefix):
                self._add(path[len(prefix) :] or "/", who, "watched")

    def _add(self, target: str, who: tuple[int, str], how: str, *, locked: bool = False) -> None:
        deleted = target.endswith(proc.DELETED) and not os.path.lexists(f"{self._rootfs}{target}")
        path = target.removesuffix(proc.DELETED) if deleted else target
        self._found[target, how] = Held(path.strip("/"), who[0], who[1], how, deleted, locked)


def mapped_shared(pids: Iterable[int]) -> set[str]:
    """The paths, as :class:`Held` has them, that some of these processes map shared: what others write, they see there.

    A private mapping is of a file that nobody is expected to write (mmap(2): what is seen then is unspecified).
    """
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(*proc.GONE):
            found.update(each.path.strip("/") for each in proc.mappings(pid) if each.shared)
    return found


class _Root:
    """The root directory of a process, in which names are as it sees them. Raises OSError."""

    def __init__(self, pid: int) -> None:
        self._root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._root)

    def leads_to(self, name: str, file: int, target: str) -> bool:
        """Whether ``name`` is one of ``file``, which is at ``target``. Relative to what a name was, nobody knows."""
        if not name.startswith("/"):
            return os.path.basename(name) == os.path.basename(target)
        try:
            found = files.open_below(self._root, name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return os.path.samestat(os.fstat(found), os.fstat(file))
        finally:
            os.close(found)

    def other_name(self, gone: str, file: int) -> str | None:
        """Another name, in the same directory, of a ``file`` whose name is ``gone``; None if it has none there."""
        there = os.fstat(file)
        if there.st_nlink == 0:
            return None
        folder = os.path.dirname(gone)
        try:
            directory = files.open_below(self._root, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
                        continue
                    if os.path.samestat(entry.stat(follow_symlinks=False), there):
                        return f"{folder.rstrip('/')}/{entry.name}"
        finally:
            os.close(directory)
        return None


@contextlib.contextmanager
def _unless_changed() -> Iterator[None]:
    """Suppress the errors of looking at a descriptor that was closed, or whose number was used again, meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CHANGED:
            raise


def _mount_of(path: str) -> int:
    """The mount that what ``path`` leads to lies in; -1 when it leads nowhere."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        return proc.mount_id(proc.fdinfo(os.getpid(), descriptor))
    finally:
        os.close(descriptor)


def unusable_watches(rootfs: Path, device: str, info: str) -> bool:
    """Whether an inotify descriptor (``info`` is its fdinfo) watches what CRIU will not find again.

    On overlay that is everything, unless it is mounted with ``index=on,nfs_export=on``: the watch shows a
    file handle that nobody can open ("fsnotify: Can't dump that handle").
    """
    return any(_by_handle(rootfs, fields) is None for fields in _watches_on(device, info))


def _watches_on(device: str, info: str) -> Iterator[dict[str, str]]:
    """The watches in an inotify fdinfo that look at the file system ``device`` ("major:minor")."""
    major, minor = (int(part) for part in device.split(":"))
    for line in info.splitlines():
        fields = dict(field.split(":", 1) for field in line.split()[1:] if ":" in field)
        if (
            line.startswith("inotify ") and int(fields["sdev"], 16) == major << 20 | minor
        ):  # the kernel's form
            yield fields


def _by_handle(rootfs: Path, fields: dict[str, str]) -> str | None:
    """The path of what a watch looks at (open_by_handle_at(2)); None if its handle is not to be used."""
    handle = bytes.fromhex(fields.get("f_handle", ""))
    packed = struct.pack("Ii", len(handle), int(fields.get("fhandle-type", "0"), 16)) + handle
    mount = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        file = syscall.libc().open_by_handle_at(mount, ctypes.c_char_p(packed), os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(mount)
    if file < 0:
        return None
    try:
        return proc.link(os.getpid(), f"fd/{file}")
    finally:
        os.close(file)


def sqlite_warnings(held: Sequence[Held]) -> list[str]:
    """One line for each SQLite database in WAL mode that is open, which a restore makes unsafe to reopen.

    SQLite knows its own locks by device and inode number, and a file laid into a fresh layer has others:
    a connection opened after the restore does not see those of one opened before it in the same process,
    takes itself for the last one at its close, and deletes the log that the other still writes.
    """
    mapped = {one.path for one in held if one.how == "mapped" and not one.deleted}
    return [
        f"{one.process} (pid {one.pid}) has the SQLite database /{one.path.removesuffix('-shm')} open in WAL"
        " mode: in a restored copy a connection opened later in the same process does not see the locks of"
        " those opened before, and commits can be lost. Close it before the request, or keep to the"
        " connections opened before it."
        for one in held
        if one.how == "open" and one.locked and one.path.endswith("-shm") and one.path in mapped
    ]
