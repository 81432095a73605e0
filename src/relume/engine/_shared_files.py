"""Files in the images that lie where other instances write too, and what CRIU would hold them to.

``/persistent-storage`` is one directory for all instances of an app: between a dump and a restore its files go on
changing, and what one instance has locked no other can lock. CRIU (4.2.1) expects neither:

- It notes the mode of every file that is open or mapped, its size unless it was opened to be written at its end only,
  and a program's build id, and refuses a restore where they are others by then: "File ... has bad size"
  (criu/files-reg.c, open_path and validate_file). The fields are optional, and what is not noted is not compared:
  :func:`loosen` takes them out.
- It takes locks again with calls that wait (flock(2), F_SETLKW) or fail (F_OFD_SETLK, F_SETLEASE) for as long as
  another has them, the original for one; and it takes those only that are in the image (criu/file-lock.c):
  :func:`unlock` takes out those that one alone can have, and leases. Locks to read, which many can have, stay.

Held to its size all the same is a file that is only mapped privately and not open for writing, as programs, libraries
and weights are. Nobody writes to such a file, they put another in its place; and pages of that one would silently
become a part of the copy's memory.

Guarantees: doing it twice changes nothing more. Does not: bring back a file that has lost its name by then.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from relume.images import read_image, write_image

_REG = 1  # fd_types of fdinfo.proto
_GHOST = 1  # remap_type of remap-file-path.proto
_LEASE = 8  # FL_LEASE of criu/include/file-lock.h
_FILE_PRIVATE, _FILE_SHARED = 1 << 6, 1 << 7  # VMA_FILE_* of criu/include/image.h
_NOTED = ("size", "mode", "build_id")


def select(directory: Path, files: Iterable[Any], points: Collection[str]) -> dict[int, Any]:
    """Of ``files`` (the entries of files.img) the regular ones that lie on a mount at one of ``points``, by id.

    To CRIU directories are such files too. Not among them: those without a name, of which each copy gets its own
    from the images. Raises ImageError.
    """
    mounts = {
        mount.mnt_id
        for path in directory.glob("mountpoints-*.img")
        for mount in read_image(path)
        if mount.mountpoint in points
    }
    remaps = directory / "remap-fpath.img"
    own = {
        each.orig_id for each in (read_image(remaps) if remaps.exists() else ()) if each.remap_type == _GHOST
    }
    regular = (file for file in files if file.HasField("reg") and file.id not in own)
    return {file.id: file.reg for file in regular if file.reg.mnt_id in mounts}


def loosen(directory: Path, shared: Mapping[int, Any]) -> bool:
    """Let the files ``shared`` (of :func:`select`) be of any size and mode at a restore; whether that changed any.

    Raises ImageError.
    """
    kept = _only_mapped_privately(directory) if shared else ()
    changed = False
    for number, entry in shared.items():
        if number in kept and entry.flags & os.O_ACCMODE == os.O_RDONLY:
            continue
        before = entry.ByteSize()
        for field in _NOTED:
            entry.ClearField(field)
        changed = changed or entry.ByteSize() != before
    return changed


def unlock(directory: Path, shared: Mapping[int, Any]) -> list[str]:
    """Take the locks on the files ``shared`` that a copy could not get out of the images; a sentence for each file.

    Raises ImageError.
    """
    path = directory / "filelocks.img"
    if not shared or not path.exists():
        return []
    tables: dict[int, dict[int, int]] = {}
    left = []
    sentences: dict[str, None] = {}  # a file may have many locks
    for lock in read_image(path):
        if lock.pid not in tables:
            tables[lock.pid] = _descriptors(directory, lock.pid)
        entry = shared.get(tables[lock.pid].get(lock.fd, -1))
        if entry is None or (lock.type == fcntl.F_RDLCK and not lock.flag & _LEASE):
            left.append(lock)
            continue
        (core,) = read_image(directory / f"core-{lock.pid}.img")
        sentences[
            f"{os.fsdecode(core.tc.comm)} (pid {lock.pid}) holds a lock on {os.fsdecode(entry.name)}, which all"
            " instances share: a restored copy does not have it. Release it before the request, or take it again"
            " afterwards."
        ] = None
    if sentences:
        write_image(path, left)
    return list(sentences)


def _descriptors(directory: Path, pid: int) -> dict[int, int]:
    """The ids of the regular files that process ``pid`` (as inside) has open, by descriptor."""
    (ids,) = read_image(directory / f"ids-{pid}.img")
    table = read_image(directory / f"fdinfo-{ids.files_id}.img")
    return {entry.fd: entry.id for entry in table if entry.type == _REG}


def _only_mapped_privately(directory: Path) -> set[int]:
    """The ids of files that processes run or map, and none maps shared."""
    private: set[int] = set()
    shared: set[int] = set()
    for path in directory.glob("mm-*.img"):
        for mm in read_image(path):
            private.add(mm.exe_file_id)
            private.update(vma.shmid for vma in mm.vmas if vma.status & _FILE_PRIVATE)
            shared.update(vma.shmid for vma in mm.vmas if vma.status & _FILE_SHARED)
    return private - shared
