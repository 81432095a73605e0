"""Copying parts of a writable layer, entry by entry, without ever following a name out of it.

The layer was written by the app: any name in it may be a symbolic link to anywhere by the time we use it.
So every step goes through a directory descriptor and O_NOFOLLOW, and no path is ever resolved by the kernel.

A copy keeps type, permissions, times (ns), extended attributes and holes; owners are moved by a constant.
It makes neither hashes nor fsyncs: one side of this runs while the app is frozen.

Not copied: device nodes (an app cannot have made one; overlay whiteouts, which are character devices 0:0,
are), ``security.*`` attributes (file capabilities have no effect under no_new_privs, and labels belong to
the machine), and overlay's bookkeeping of where an entry was copied up from, which names inodes of the old
lower layers and, in a mount with ``index=on``, makes the kernel refuse or hide what it does not find there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_FICLONE = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK = 64 << 20
_OPEN_LIMIT = 256
DEEPEST = 200
"""Levels of directories that are looked into. Nothing sane is deeper, and what meets a copy later recurses."""

_OVERLAY_KEPT = frozenset(
    f"trusted.overlay.{name}"
    for name in ("opaque", "redirect", "metacopy", "whiteout", "xwhiteouts", "protattr")
)
_HIDING = frozenset({"trusted.overlay.opaque", "trusted.overlay.redirect"})
"""On a directory: what it has instead of what the layers below have by its name."""
_ACLS = frozenset({"system.posix_acl_access", "system.posix_acl_default"})

Shift = Callable[[int], int]
"""An owner (uid or gid) on one side to the same owner on the other."""


class Abandoned(Exception):
    """The copy is not wanted any more."""


def is_whiteout(status: os.stat_result) -> bool:
    """Whether an entry is overlay's mark of a deleted name of a lower layer."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class Tree:
    """A directory tree, by descriptors. Opened directories are kept for a while: see :meth:`trim`."""

    def __init__(self, root: Path) -> None:
        self._open: dict[str, int] = {"": os.open(root, _DIRECTORY)}

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def trim(self) -> None:
        """Close what is open when it is too much; descriptors got before are not valid any more."""
        if len(self._open) > _OPEN_LIMIT:
            for path in [path for path in self._open if path]:
                os.close(self._open.pop(path))

    def directory(self, path: str) -> int:
        """A descriptor of the directory ``path`` ("" is the root); OSError for a symbolic link too."""
        if path not in self._open:
            parent, _, name = path.rpartition("/")
            self._open[path] = os.open(name, _DIRECTORY, dir_fd=self.directory(parent))
        return self._open[path]

    def stat(self, path: str) -> os.stat_result | None:
        """What ``path`` is, itself; None where it or a directory above it is not there."""
        parent, _, name = path.rpartition("/")
        try:
            if not path:
                return os.fstat(self.directory(""))
            return os.stat(name, dir_fd=self.directory(parent), follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def attributes(self, path: str) -> list[str]:
        """The names of the extended attributes of ``path``, which is no symbolic link and is there."""
        parent, _, name = path.rpartition("/")
        return os.listxattr(f"/proc/self/fd/{self.directory(parent)}/{name}", follow_symlinks=False)

    def names(self, path: str) -> list[str]:
        """The names in directory ``path``, sorted."""
        return sorted(os.listdir(self.directory(path)))

    def walk(self, path: str = "") -> Iterator[tuple[str, os.stat_result]]:
        """Every entry below ``path``, by name, directories before what is in them, down to :data:`DEEPEST` levels.

        In a tree that lives, what goes away meanwhile is left out.
        """
        if path.count("/") >= DEEPEST:
            return
        try:
            names = self.names(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            self.trim()
            inner = f"{path}/{name}" if path else name
            status = self.stat(inner)
            if status is None:
                continue
            yield inner, status
            if stat.S_ISDIR(status.st_mode):
                yield from self.walk(inner)


class Copier:
    """Copies entries of a :class:`Tree` to the same paths below ``target``, which must exist.

    Directories get their attributes in :meth:`finish`, because making an entry changes the times of the
    directory above it. Hard links between copied entries stay hard links. With ``onto`` the directories that
    ``target`` has stay as they are, and a source that lives may lose some meanwhile. With ``above`` the target is to
    be mounted right above the source: its directories then hide nothing, least of all the source's. ``abandoned`` is
    asked now and then whether anybody waits still.
    """

    def __init__(
        self,
        source: Tree,
        target: Path,
        shift: Shift,
        *,
        onto: bool = False,
        above: bool = False,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        self._source = source
        self._target = Tree(target)
        self._shift = shift
        self._onto = onto
        self._above = above
        self._abandoned = abandoned
        self._directories: dict[str, os.stat_result] = {}
        self._linked: dict[tuple[int, int], str] = {}
        self._clone = True
        self.files = 0
        self.bytes = 0

    def close(self) -> None:
        self._target.close()

    def directory(self, path: str) -> bool:
        """Copy directory ``path`` and those above it; False if the source has no such directory."""
        if path in self._directories or (self._onto and self._target.stat(path) is not None):
            return True
        status = self._source.stat(path)
        if status is None or not stat.S_ISDIR(status.st_mode):
            return False
        self._source.trim()
        self._target.trim()
        if path:
            parent, _, name = path.rpartition("/")
            if not self.directory(parent):
                return False  # renamed meanwhile
            try:
                os.mkdir(name, 0o700, dir_fd=self._target.directory(parent))
            except FileExistsError:
                self._target.directory(path)  # raises if what is there is no directory
        self._directories[path] = status
        return True

    def entry(self, path: str, status: os.stat_result) -> bool:
        """Copy one entry, of any kind, and the directories above it; False for a kind that we leave.

        Raises Abandoned once nobody wants the copy any more.
        """
        if self._abandoned():
            raise Abandoned
        mode = status.st_mode
        if stat.S_ISDIR(mode):
            return self.directory(path)
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not is_whiteout(status)):
            return False
        self._source.trim()
        self._target.trim()
        parent, _, name = path.rpartition("/")
        if not self.directory(parent):
            return False
        here, there = self._source.directory(parent), self._target.directory(parent)
        if status.st_nlink > 1 and self._link(status, path, name, there):
            return True
        if stat.S_ISREG(mode):
            self._regular(name, here, there, status)
            self.files += 1
            self.bytes += min(status.st_size, status.st_blocks * 512)
            return True
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(name, dir_fd=here), name, dir_fd=there)
        else:
            os.mknod(name, mode, status.st_rdev, dir_fd=there)
        self._attributes(f"/proc/self/fd/{here}/{name}", f"/proc/self/fd/{there}/{name}", status)
        return True

    def finish(self) -> None:
        """Give the directories their attributes, the deepest first."""
        for path in sorted(self._directories, key=lambda path: path.count("/") if path else -1, reverse=True):
            self._source.trim()
            self._target.trim()
            try:
                source = self._source.directory(path)
            except (FileNotFoundError, NotADirectoryError):
                if self._onto:
                    continue  # gone since; the copy of it stays private to root
                raise
            self._attributes(source, self._target.directory(path), self._directories[path])

    def _link(self, status: os.stat_result, path: str, name: str, there: int) -> bool:
        key = (status.st_dev, status.st_ino)
        if (first := self._linked.setdefault(key, path)) == path:
            return False
        parent, _, first_name = first.rpartition("/")
        os.link(
            first_name,
            name,
            src_dir_fd=self._target.directory(parent),
            dst_dir_fd=there,
            follow_symlinks=False,
        )
        return True

    def _regular(self, name: str, here: int, there: int, status: os.stat_result) -> None:
        flags = os.O_NOFOLLOW | os.O_CLOEXEC
        source = os.open(name, os.O_RDONLY | os.O_NOATIME | os.O_NONBLOCK | flags, dir_fd=here)
        try:
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600, dir_fd=there)
            try:
                self._data(source, target, status)
                self._attributes(source, target, status)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _data(self, source: int, target: int, status: os.stat_result) -> None:
        if self._clone and status.st_size:
            try:
                fcntl.ioctl(target, _FICLONE, source)
                return
            except OSError:
                self._clone = False  # not a file system with shared extents, or not the same one
        if status.st_blocks * 512 >= status.st_size:
            self._range(source, target, 0, status.st_size)
            return
        os.ftruncate(target, status.st_size)
        end = 0
        while end < status.st_size:
            try:
                start = os.lseek(source, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole from here on
                    return
                raise
            end = os.lseek(source, start, os.SEEK_HOLE)
            self._range(source, target, start, end)

    def _range(self, source: int, target: int, start: int, end: int) -> None:
        """Copy the bytes [start, end) to the same place, in the kernel."""
        while start < end:
            if self._abandoned():
                raise Abandoned
            done = _copy(source, target, start, min(end - start, _CHUNK))
            if done == 0:
                return  # the file became shorter, which only a file that nobody froze can do
            start += done

    def _attributes(self, source: int | str, target: int | str, status: os.stat_result) -> None:
        link = stat.S_ISLNK(status.st_mode)
        follow = isinstance(target, int)  # a descriptor is the entry itself; a path must not go further
        os.chown(target, self._shift(status.st_uid), self._shift(status.st_gid), follow_symlinks=follow)
        if not link:  # a symbolic link has no permissions of its own (symlink(7))
            os.chmod(target, stat.S_IMODE(status.st_mode))  # after chown, which clears set-id bits
        if not is_whiteout(status):
            hiding = self._above and stat.S_ISDIR(status.st_mode)
            self._xattrs(source, target, follow, _OVERLAY_KEPT - _HIDING if hiding else _OVERLAY_KEPT)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=follow)

    def _xattrs(self, source: int | str, target: int | str, follow: bool, overlay: frozenset[str]) -> None:
        for name in os.listxattr(source, follow_symlinks=follow):
            if not (name.startswith("user.") or name in overlay or name in _ACLS):
                continue
            value = os.getxattr(source, name, follow_symlinks=follow)
            try:
                os.setxattr(
                    target, name, self._acl(value) if name in _ACLS else value, follow_symlinks=follow
                )
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM) or name in _OVERLAY_KEPT:
                    raise

    def _acl(self, value: bytes) -> bytes:
        """A POSIX ACL with its ids shifted: a version, then (tag, permissions, id) each (acl(5))."""
        out = [value[:4]]
        for tag, permissions, owner in struct.iter_unpack("<HHI", value[4:]):
            named = tag in (0x02, 0x08)  # ACL_USER, ACL_GROUP; the others carry no id
            out.append(struct.pack("<HHI", tag, permissions, self._shift(owner) if named else owner))
        return b"".join(out)


def _copy(source: int, target: int, start: int, size: int) -> int:
    """Copy some of ``size`` bytes from ``start`` on; returns how many."""
    try:
        return os.copy_file_range(source, target, size, start, start)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    os.lseek(target, start, os.SEEK_SET)
    return os.sendfile(target, source, start, size)
