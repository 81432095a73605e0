"""From what commands wrote to a layer: what does not belong in it is taken out, times are made from content.

An overlay's upper directory after a build holds more than the build: logs and caches with times in them,
directories that were only touched, overlayfs's own notes. Removed here, the same inputs give the same layer on
every node.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from relume.build import tree

_BOOKKEEPING = (
    "trusted.overlay.origin",
    "trusted.overlay.impure",
    "trusted.overlay.nlink",
    "trusted.overlay.uuid",
)

_VOLATILE = (
    "etc/.pwd.lock",
    "etc/hostname",
    "etc/machine-id",
    "etc/resolv.conf",
    "root/.python_history",
    "root/.wget-hsts",
    "var/cache/apt/archives/*.deb",
    "var/cache/apt/archives/lock",
    "var/cache/apt/archives/partial",
    "var/cache/apt/*.bin",
    "var/cache/debconf/*-old",
    "var/cache/ldconfig/aux-cache",
    "var/lib/apt/lists/*",
    "var/lib/dpkg/*-old",
    "var/lib/dpkg/lock*",
    "var/lib/systemd/random-seed",
    "var/log/alternatives.log",
    "var/log/apt/*",
    "var/log/bootstrap.log",
    "var/log/btmp",
    "var/log/dpkg.log",
    "var/log/faillog",
    "var/log/fontconfig.log",
    "var/log/lastlog",
    "var/log/wtmp",
)
"""Files that package tools leave, different each time and needed by nobody at run time. The runtime mounts
its own resolv.conf and hostname."""


def settle(
    upper: Path, lowers: Sequence[Path], *, since: float, check: Callable[[], None] = tree.nothing
) -> None:
    """Make an unmounted upper directory fit to be a layer over ``lowers`` (lowest first).

    Regular files changed at or after ``since`` (seconds) get a time made from their bytes; older ones came
    with that time out of a package, and caches beside them (``.pyc``) rely on it.
    """
    _scrub(upper, check)
    for path, _ in _bottom_up(upper, check):
        _forget_overlay(path)
    _forget_overlay(upper)
    for path, status in _bottom_up(upper, check):
        if stat.S_ISDIR(status.st_mode) and _only_touched(path, path.relative_to(upper), lowers):
            path.rmdir()
    set_times(upper, since=since, check=check)


def set_times(root: Path, *, since: float = 0.0, check: Callable[[], None] = tree.nothing) -> None:
    """Give regular files below ``root`` changed at or after ``since`` the time of their content."""
    for relative, status in tree.walk(root, check):
        if stat.S_ISREG(status.st_mode) and status.st_mtime >= since:
            moment = tree.content_time(tree.hash_file(root / relative, check))
            os.utime(root / relative, (moment, moment), follow_symlinks=False)


def _scrub(upper: Path, check: Callable[[], None]) -> None:
    for pattern in _VOLATILE:
        for path in upper.glob(pattern):
            check()
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                path.unlink()
            elif stat.S_ISDIR(status.st_mode) and not any(path.iterdir()):
                path.rmdir()


def _bottom_up(root: Path, check: Callable[[], None]) -> list[tuple[Path, os.stat_result]]:
    return [(root / relative, status) for relative, status in tree.walk(root, check)][::-1]


def _forget_overlay(path: Path) -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        if name in _BOOKKEEPING:
            os.removexattr(path, name, follow_symlinks=False)


def _only_touched(path: Path, relative: Path, lowers: Sequence[Path]) -> bool:
    """Whether an upper directory is empty and says nothing that the layers below it do not."""
    if any(path.iterdir()) or os.listxattr(path):
        return False
    mine = path.lstat()
    for lower in reversed(lowers):
        try:
            below = (lower / relative).lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return stat.S_ISDIR(below.st_mode) and (below.st_mode, below.st_uid, below.st_gid) == (
            mine.st_mode,
            mine.st_uid,
            mine.st_gid,
        )
    return False
