"""What a node takes away of what was killed before it."""

from __future__ import annotations

import os
from pathlib import Path

from relume.node import machine


def test_only_old_and_empty_mount_roots_go(tmp_path: Path) -> None:
    for name, age in ((".criu.mntns.aBcDeF", 7200), (".criu.mntns.filled", 7200), (".criu.mntns.recent", 60)):
        (tmp_path / name).mkdir()
        if name.endswith("filled"):
            (tmp_path / name / "file").touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    machine._sweep_mount_roots(tmp_path, 1e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".criu.mntns.filled", ".criu.mntns.recent"]
