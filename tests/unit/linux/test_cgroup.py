"""Control groups on directories that look like them: version 1 with its trees, and version 2."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest

from relume.linux import cgroup

GROUP = "/relume/n/i-1"


@pytest.fixture(params=["v1", "v2"])
def trees(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The group's directory in each hierarchy: memory and freezer apart (v1), or one for all (v2)."""
    roots = [tmp_path / "memory", tmp_path / "freezer"] if request.param == "v1" else [tmp_path]
    monkeypatch.setattr(cgroup, "hierarchies", lambda: tuple(roots))
    found = [root / GROUP[1:] for root in roots]
    for directory in found:
        directory.mkdir(parents=True)
    if request.param == "v1":
        (found[0] / "memory.usage_in_bytes").write_text("1234\n")
        (found[0] / "memory.limit_in_bytes").write_text("4096\n")
        (found[1] / "freezer.state").write_text("THAWED\n")
    else:
        (found[0] / "memory.current").write_text("1234\n")
        (found[0] / "memory.max").write_text("4096\n")
        (found[0] / "cgroup.freeze").write_text("0\n")
    return found


def limit_file(trees: list[Path]) -> Path:
    return next(
        path for name in ("memory.limit_in_bytes", "memory.max") if (path := trees[0] / name).exists()
    )


def test_memory(trees: list[Path]) -> None:
    assert cgroup.memory(GROUP) == (1234, 4096)
    limit_file(trees).write_text("max\n" if len(trees) == 1 else "9223372036854771712\n")
    assert cgroup.memory(GROUP) == (1234, None)


def test_a_group_that_goes_away_is_no_error(trees: list[Path]) -> None:
    """`relume ps` must not fail because an instance ended in this moment."""
    limit_file(trees).unlink()
    assert cgroup.memory(GROUP) == (0, None)
    assert cgroup.memory("/relume/n/never") == (0, None)
    assert cgroup.processes("/relume/n/never") == []
    cgroup.kill("/relume/n/never")
    cgroup.remove("/relume/n/never")


def test_freeze_and_thaw(trees: list[Path]) -> None:
    state = trees[-1] / ("freezer.state" if len(trees) == 2 else "cgroup.freeze")
    cgroup.freeze(GROUP)
    assert state.read_text() in ("FROZEN", "1")
    cgroup.thaw(GROUP)
    assert state.read_text() in ("THAWED", "0")


def test_processes_of_the_groups_below_too(trees: list[Path]) -> None:
    (trees[0] / "cgroup.procs").write_text("20\n3\n")
    (trees[-1] / "inner").mkdir()
    (trees[-1] / "inner" / "cgroup.procs").write_text("3\n100\n")
    assert cgroup.processes(GROUP) == [3, 20, 100]


def test_kill_thaws_what_it_kills(trees: list[Path]) -> None:
    """A frozen task of version 1 takes no signal until it is thawed."""
    child = subprocess.Popen(["sleep", "60"])
    (trees[0] / "cgroup.procs").write_text(f"{child.pid}\n")
    cgroup.freeze(GROUP)
    cgroup.kill(GROUP, timeout=0.05)
    assert child.wait(timeout=5) == -signal.SIGKILL
    state = trees[-1] / ("freezer.state" if len(trees) == 2 else "cgroup.freeze")
    assert state.read_text() in ("THAWED", "0")


def test_remove_takes_the_inner_groups_first(trees: list[Path]) -> None:
    for directory in trees:
        (directory / "a" / "b").mkdir(parents=True)
        for file in [*directory.iterdir()]:
            if file.is_file():
                file.unlink()  # in the real tree rmdir(2) takes them along
    cgroup.remove(GROUP)
    assert not any(directory.exists() for directory in trees)
    assert all(directory.parent.exists() for directory in trees)


@pytest.mark.parametrize("group", ["", "/", "/relume/../..", "../x"])
def test_no_group_that_is_not_ours(trees: list[Path], group: str) -> None:
    """An empty name would be the root of the tree: every process of the machine."""
    with pytest.raises(ValueError, match="not a group of ours"):
        cgroup.kill(group)


def test_a_write_that_fails_names_the_file(tmp_path: Path) -> None:
    cgroup._write(tmp_path / "gone" / "freezer.state", "THAWED")
    with pytest.raises(OSError) as failed:
        cgroup._write(Path("/dev/full"), "THAWED")
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, "/dev/full")


def test_this_machine() -> None:
    assert all(root.is_dir() for root in cgroup.hierarchies())


def test_elsewhere() -> None:
    """By what the kernel says of us: our own group, one above it, and one that is not ours."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = max((line.split(":", 2)[2] for line in lines), key=len)
    assert not cgroup.elsewhere(os.getpid(), own)
    assert cgroup.elsewhere(os.getpid(), GROUP)
    assert not cgroup.elsewhere(_gone(), GROUP)


def _gone() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


MOUNTS = (
    "tmpfs /dev tmpfs rw 0 0\n"
    "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime{} 0 0\n"
    "cgroup2 /other cgroup2 ro 0 0\n"
)


def test_version_2_keeps_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    said = [MOUNTS.format(",nsdelegate,memory_recursiveprot")]
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a: said[0] if path == Path("/proc/self/mounts") else read(path, *a)
    )
    monkeypatch.setattr(cgroup.mounts, "mount", lambda *arguments: made.append(arguments))
    cgroup.options.cache_clear()
    try:
        assert cgroup.options() == ("nsdelegate", "memory_recursiveprot")
        cgroup.keep_options()
        assert not made
        said[0] = MOUNTS.format("")
        cgroup.keep_options()
        flags = 32 | 2 | 4 | 8 | 1 << 21
        assert made == [("cgroup2", Path("/sys/fs/cgroup"), None, flags, "nsdelegate,memory_recursiveprot")]
        cgroup.options.cache_clear()  # never had any: nothing to give back
        cgroup.keep_options()
        assert len(made) == 1
    finally:
        cgroup.options.cache_clear()


def test_processes_beside_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "unified", lambda: True)
    (tmp_path / "cgroup.procs").write_text("1\n")
    (tmp_path / "cgroup.subtree_control").write_text("pids\n")
    assert not cgroup.crowded(), "the real root may have both"
    (tmp_path / "cgroup.type").write_text("domain\n")
    assert "cpu, memory from the groups" in cgroup.crowded()
    (tmp_path / "cgroup.subtree_control").write_text("cpuset cpu memory pids\n")
    assert not cgroup.crowded()
    (tmp_path / "cgroup.subtree_control").write_text("")
    (tmp_path / "cgroup.procs").write_text("")
    assert not cgroup.crowded(), "runc turns them on itself"
