"""Files that all instances have, in images written here in CRIU's own format."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from relume.engine import edit
from relume.images import read_image, write_image
from relume.images.proto import (
    core_pb2,
    fdinfo_pb2,
    file_lock_pb2,
    mm_pb2,
    mnt_pb2,
    remap_file_path_pb2,
)

SHARED = ("/persistent-storage",)
ROOT, PERSISTENT = 111, 129
POSIX, FLOCK, OFD, LEASE = 1, 2, 4, 8
READ, WRITE = fcntl.F_RDLCK, fcntl.F_WRLCK


def reg(number: int, name: str, mount: int, flags: int = os.O_RDWR) -> Any:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=number)
    file = entry.reg
    file.id, file.flags, file.pos, file.name, file.mnt_id = number, flags, 0, name, mount
    file.size, file.mode = 4096, 0o100644
    file.build_id[:] = [4, 5]
    file.fown.uid = file.fown.euid = file.fown.signum = file.fown.pid_type = file.fown.pid = 0
    return entry


def write(directory: Path, *files: Any) -> None:
    """The mounts and files of a container, as CRIU writes them, and a process without memory."""
    mounts = [
        mnt_pb2.mnt_entry(
            fstype=mnt_pb2.UNSUPPORTED, mnt_id=number, root_dev=1, parent_mnt_id=0, flags=0, root="/",
            mountpoint=point, source="", options="",
        )
        for number, point in ((ROOT, "/"), (PERSISTENT, "/persistent-storage"), (130, "/persistent-storage-2"))
    ]  # fmt: skip
    write_image(directory / "mountpoints-13.img", mounts, kind="MNTS")
    write_image(directory / "files.img", files, kind="FILES")


def write_memory(directory: Path, *mapped: tuple[int, int], exe: int = 0) -> None:
    """``mapped`` are files by id, each with a status of vma_entry."""
    fields = [each.name for each in mm_pb2.mm_entry.DESCRIPTOR.fields if each.is_required]
    mm = mm_pb2.mm_entry(**{**dict.fromkeys(fields, 0), "exe_file_id": exe})
    for number, status in mapped:
        mm.vmas.add(start=0, end=4096, pgoff=0, shmid=number, prot=1, flags=0, status=status, fd=-1)
    write_image(directory / "mm-7.img", [mm], kind="MM")


def write_locks(directory: Path, open_files: dict[int, int], *locks: tuple[int, int, int]) -> None:
    """Of process 7: its files by descriptor; ``locks`` are each a kind, a type and a descriptor."""
    ids = core_pb2.task_kobj_ids_entry(vm_id=1, files_id=2, fs_id=3, sighand_id=4)
    write_image(directory / "ids-7.img", [ids], kind="IDS")
    table = [
        fdinfo_pb2.fdinfo_entry(id=number, flags=0, type=fdinfo_pb2.REG, fd=fd)
        for fd, number in open_files.items()
    ]
    pipe = fdinfo_pb2.fdinfo_entry(id=900, flags=0, type=fdinfo_pb2.PIPE, fd=1)
    write_image(directory / "fdinfo-2.img", [pipe, *table], kind="FDINFO")
    core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    core.tc.task_state = core.tc.exit_code = core.tc.personality = core.tc.flags = core.tc.blk_sigset = 0
    core.tc.comm = "keeper"
    write_image(directory / "core-7.img", [core], kind="CORE")
    entries = [
        file_lock_pb2.file_lock_entry(flag=kind, type=type_, pid=7, fd=fd, start=0, len=0)
        for kind, type_, fd in locks
    ]
    write_image(directory / "filelocks.img", entries, kind="FILE_LOCKS")


def noted(directory: Path) -> dict[int, tuple[bool, bool, int]]:
    """Of each file whether its size and its mode are in the images, and the words of its build id."""
    files = (entry.reg for entry in read_image(directory / "files.img"))
    return {each.id: (each.HasField("size"), each.HasField("mode"), len(each.build_id)) for each in files}


def locks(directory: Path) -> list[tuple[int, int, int]]:
    return [(each.flag, each.type, each.fd) for each in read_image(directory / "filelocks.img")]


ALL, NOTHING = (True, True, 2), (False, False, 0)


def test_only_files_that_others_write_too_may_be_of_any_size(tmp_path: Path) -> None:
    files = [
        reg(1, "/persistent-storage/log", PERSISTENT),
        reg(2, "/tmp/log", ROOT),
        reg(3, "/persistent-storage-2/log", 130),
        reg(4, "/persistent-storage", PERSISTENT, os.O_RDONLY | os.O_DIRECTORY),
        reg(5, "/persistent-storage/read", PERSISTENT, os.O_RDONLY),
    ]
    write(tmp_path, *files)
    edit.prepare_images(tmp_path, loopback="keep", shared=SHARED)
    assert noted(tmp_path) == {1: NOTHING, 2: ALL, 3: ALL, 4: NOTHING, 5: NOTHING}
    after = {entry.id: entry for entry in read_image(tmp_path / "files.img")}
    assert [after[2], after[3]] == files[1:3]
    assert (after[1].reg.name, after[1].reg.flags) == ("/persistent-storage/log", os.O_RDWR)

    written = (tmp_path / "files.img").stat().st_ino
    edit.prepare_images(tmp_path, loopback="keep", shared=SHARED)
    assert (tmp_path / "files.img").stat().st_ino == written, "a second time changes nothing"


def test_nothing_is_shared_unless_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, reg(1, "/persistent-storage/log", PERSISTENT))
    edit.prepare_images(tmp_path, loopback="keep")
    assert noted(tmp_path) == {1: ALL}


PRIVATE, MAPPED_SHARED = 0x41, 0x81  # regular, and VMA_FILE_PRIVATE or VMA_FILE_SHARED


@pytest.mark.parametrize(
    ("flags", "mapped", "exe", "expected"),
    [
        (os.O_RDONLY, [PRIVATE], 0, ALL),  # a library: other pages must not come into its place
        (os.O_RDONLY, [], 1, ALL),
        (
            os.O_RDONLY,
            [MAPPED_SHARED],
            0,
            NOTHING,
        ),  # a database, read through a mapping, that another extends
        (os.O_RDONLY, [PRIVATE, MAPPED_SHARED], 0, NOTHING),
        (os.O_RDWR, [PRIVATE], 0, NOTHING),
    ],
)
def test_a_library_must_be_the_same(
    tmp_path: Path, flags: int, mapped: list[int], exe: int, expected: tuple[bool, bool, int]
) -> None:
    write(tmp_path, reg(1, "/persistent-storage/venv/lib.so", PERSISTENT, flags))
    write_memory(tmp_path, *((1, status) for status in mapped), exe=exe)
    edit.prepare_images(tmp_path, loopback="keep", shared=SHARED)
    assert noted(tmp_path) == {1: expected}


def test_locks_that_only_one_can_have_stay_with_who_has_them(tmp_path: Path) -> None:
    write(
        tmp_path,
        reg(1, "/persistent-storage/db", PERSISTENT),
        reg(2, "/tmp/own", ROOT),
        reg(3, "/persistent-storage/read", PERSISTENT, os.O_RDONLY),
    )
    own = [(POSIX, WRITE, 4), (FLOCK, WRITE, 4), (LEASE, READ, 4)]
    shared = [(POSIX, READ, 3), (FLOCK, READ, 3), (OFD, READ, 3)]
    gone = [(FLOCK, WRITE, 3), (POSIX, WRITE, 3), (OFD, WRITE, 3), (LEASE, READ, 5), (LEASE, WRITE, 3)]
    write_locks(tmp_path, {3: 1, 4: 2, 5: 3}, *own, *gone, *shared)
    report = edit.prepare_images(tmp_path, loopback="keep", shared=SHARED)
    assert locks(tmp_path) == own + shared
    assert [line.partition(",")[0] for line in report.warnings] == [
        "keeper (pid 7) holds a lock on /persistent-storage/db",
        "keeper (pid 7) holds a lock on /persistent-storage/read",
    ]
    assert edit.prepare_images(tmp_path, loopback="keep", shared=SHARED).warnings == ()
    assert locks(tmp_path) == own + shared


def test_no_lock_may_be_left(tmp_path: Path) -> None:
    """What CRIU then finds is an image without entries, as it reads one without locks."""
    write(tmp_path, reg(1, "/persistent-storage/lock", PERSISTENT))
    write_locks(tmp_path, {3: 1}, (FLOCK, WRITE, 3))
    edit.prepare_images(tmp_path, loopback="keep", shared=SHARED)
    assert locks(tmp_path) == []
    assert (tmp_path / "filelocks.img").stat().st_size == 8


def test_a_file_without_a_name_is_each_copys_own(tmp_path: Path) -> None:
    write(tmp_path, reg(1, "/persistent-storage/tmpx", PERSISTENT))
    write_locks(tmp_path, {3: 1}, (FLOCK, WRITE, 3))
    ghost = remap_file_path_pb2.remap_file_path_entry(
        orig_id=1, remap_id=1, remap_type=remap_file_path_pb2.GHOST
    )
    write_image(tmp_path / "remap-fpath.img", [ghost], kind="REMAP_FPATH")
    assert edit.prepare_images(tmp_path, loopback="keep", shared=SHARED).warnings == ()
    assert (noted(tmp_path), locks(tmp_path)) == ({1: ALL}, [(FLOCK, WRITE, 3)])
