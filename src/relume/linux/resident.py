"""Files kept in memory: mapped and locked, so that neither pressure nor a dropped page cache takes them away.

A restore on a machine that has been doing something else begins with reading runc, CRIU and their libraries from the
disk, one page fault after the other: 0.4 s of a start, before anything of the app. They are 30 MB.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from relume.linux import syscall

_PROT_READ = 1
_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value


def programs(names: Iterable[str | Path]) -> list[Path]:
    """The files of these programs and of the libraries they start with; those that are not there are left out."""
    found: dict[Path, None] = {}
    for name in names:
        if (where := shutil.which(name)) is None:
            continue
        found[Path(where).resolve()] = None
        said = subprocess.run(["ldd", where], capture_output=True, text=True, check=False).stdout
        for line in said.splitlines():
            # "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", "/lib64/ld-linux-x86-64.so.2 (0x...)"
            path = next((Path(word) for word in line.split() if word.startswith("/")), None)
            if path is not None and path.exists():
                found[path.resolve()] = None
    return list(found)


def hold(paths: Iterable[Path]) -> int:
    """Keep these files in memory until this process ends; the bytes that are. What cannot be kept is left out."""
    held = 0
    libc = syscall.libc()
    libc.mmap.restype = ctypes.c_void_p
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            size = os.fstat(descriptor).st_size
            # Shared, not private: mlock(2) on a private writable mapping would copy every page.
            address = libc.mmap(
                None, ctypes.c_size_t(size), _PROT_READ, _MAP_SHARED, descriptor, ctypes.c_long(0)
            )
            if address != _MAP_FAILED and libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) == 0:
                held += size
        finally:
            os.close(descriptor)
    return held
