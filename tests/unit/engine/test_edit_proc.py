"""Names of files in /proc, on images written here in CRIU's own format."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from relume.engine import edit
from relume.images import read_image, write_image
from relume.images.proto import core_pb2, fdinfo_pb2, pstree_pb2

FOLDER = stat.S_IFDIR | 0o555


def named(name: str, mode: int = stat.S_IFREG | 0o444) -> Any:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=1)
    entry.reg.id, entry.reg.flags, entry.reg.pos, entry.reg.name, entry.reg.mode = 1, 0, 0, name, mode
    entry.reg.fown.uid = entry.reg.fown.euid = entry.reg.fown.signum = 0
    entry.reg.fown.pid_type = entry.reg.fown.pid = 0
    return entry


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Process 5 with thread 6, and process 7."""
    tasks = [pstree_pb2.pstree_entry(pid=pid, ppid=1, pgid=1, sid=1) for pid in (5, 7)]
    tasks[0].threads[:] = [5, 6]
    tasks[1].threads[:] = [7]
    write_image(tmp_path / "pstree.img", tasks, kind="PSTREE")
    core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    core.tc.task_state, core.tc.exit_code, core.tc.personality, core.tc.flags = 1, 0, 0, 0
    core.tc.blk_sigset, core.tc.comm = 0, "clickhouse"
    write_image(tmp_path / "core-5.img", [core], kind="CORE")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "mode", "instead", "told"),
    [
        ("/proc/5/task/6/schedstat", 0, "/proc/5/task/5/schedstat", True),
        ("/proc/5/task/6", FOLDER, "/proc/5/task/5", True),
        ("/proc/5/task/9/stat", 0, "/proc/5/task/5/stat", True),  # of a thread that has ended
        ("/proc/6/stat", 0, "/proc/5/stat", True),
        ("/proc/6/task/5/stat", 0, "/proc/5/task/5/stat", True),
        ("/proc/6/\x10", FOLDER, "/proc/5", True),
        ("/proc/5/\n/c.so", FOLDER, "/proc/5", False),
        ("/proc/5/", FOLDER, "/proc/5", False),
        ("/proc/5/fd", FOLDER, "/proc/5/fd", False),
        ("/proc/5/task/5/stat", 0, "/proc/5/task/5/stat", False),
        (
            "/proc/8/task/9/stat",
            0,
            "/proc/8/task/9/stat",
            False,
        ),  # a process that has ended is CRIU's to make
        ("/proc/7/stat", 0, "/proc/7/stat", False),
        ("/proc/meminfo", 0, "/proc/meminfo", False),
        ("/data/proc/5/task/6/stat", 0, "/data/proc/5/task/6/stat", False),
    ],
)
def test_names(images: Path, name: str, mode: int, instead: str, told: bool) -> None:
    write_image(images / "files.img", [named(name, mode)], kind="FILES")
    warnings = edit.prepare_images(images, loopback="keep").warnings
    assert [entry.reg.name for entry in read_image(images / "files.img")] == [instead]
    assert len(warnings) == told
    if told:
        assert warnings[0].startswith("files about single threads of clickhouse (pid 5) are open (/proc/")
    assert edit.prepare_images(images, loopback="keep").warnings == ()
