"""What a node takes away of what was killed before it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relume.linux import cgroup
from relume.node import machine, places


def test_only_old_and_empty_mount_roots_go(tmp_path: Path) -> None:
    for name, age in ((".criu.mntns.aBcDeF", 7200), (".criu.mntns.filled", 7200), (".criu.mntns.recent", 60)):
        (tmp_path / name).mkdir()
        if name.endswith("filled"):
            (tmp_path / name / "file").touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    machine._sweep_mount_roots(tmp_path, 1e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".criu.mntns.filled", ".criu.mntns.recent"]


def test_tidying_up_leaves_other_nodes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their groups are empty for a moment, when they have no instance."""
    monkeypatch.setattr(cgroup, "hierarchies", lambda: (tmp_path / "cgroup",))
    monkeypatch.setattr(machine, "RUN", tmp_path / "run")
    monkeypatch.setattr(places, "RUN", tmp_path / "run")
    groups = tmp_path / "cgroup/relume"
    for node in ("mine", "other"):
        (groups / node / "i-1").mkdir(parents=True)
    mine = places.Places(tmp_path / "state", "mine")
    mine.runc_root.mkdir(parents=True)
    machine.tidy(mine)
    assert sorted(path.name for path in groups.iterdir()) == ["other"]
    assert (groups / "other/i-1").is_dir()
    assert not (tmp_path / "run").exists()
    (groups / "other/i-1").rmdir()
    (groups / "other").rmdir()
    machine.tidy(mine)
    assert not groups.exists()
