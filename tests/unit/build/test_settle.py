"""What becomes of an overlay's upper directory before it is a layer."""

from __future__ import annotations

import os
from pathlib import Path

from relume.build import settle, tree


def write(path: Path, text: str = "", age: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if age is not None:
        os.utime(path, (age, age))
    return path


def test_what_package_tools_leave_goes(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    for name in (
        *(
            "var/log/dpkg.log",
            "var/log/apt/history.log",
            "var/lib/apt/lists/lock",
            "var/cache/apt/pkgcache.bin",
        ),
        *("etc/resolv.conf", "etc/machine-id", "var/lib/dpkg/status-old"),
    ):
        write(upper / name, "x")
    kept = [write(upper / name) for name in ("var/lib/dpkg/status", "var/log/mine.log", "etc/app.conf")]
    settle.settle(upper, (), since=0)
    assert sorted(path for path in upper.rglob("*") if path.is_file()) == sorted(kept)


def test_directories_that_were_only_touched_go(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for root in (lower, upper):
        (root / "opt/same").mkdir(parents=True)
        (root / "opt/mode").mkdir()
        (root / "kept").mkdir()
    (upper / "opt/mode").chmod(0o700)
    (upper / "opt/new").mkdir()
    write(upper / "kept/file")
    settle.settle(upper, [lower], since=0)
    left = sorted(str(path.relative_to(upper)) for path in upper.rglob("*"))
    assert left == ["kept", "kept/file", "opt", "opt/mode", "opt/new"]


def test_a_directory_over_another_kind_of_file_stays(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    write(lower / "thing")
    (upper / "thing").mkdir(parents=True)
    settle.settle(upper, [lower], since=0)
    assert (upper / "thing").is_dir()


def test_the_topmost_layer_decides(tmp_path: Path) -> None:
    low, high, upper = (tmp_path / name for name in ("low", "high", "upper"))
    for root, mode in ((low, 0o755), (high, 0o700), (upper, 0o755)):
        (root / "d").mkdir(parents=True)
        (root / "d").chmod(mode)
    settle.settle(upper, [low, high], since=0)
    assert (upper / "d").is_dir()


def test_new_files_get_the_time_of_their_content_and_old_ones_keep_theirs(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    packaged = write(upper / "usr/lib/module.py", "old", age=1_600_000_000)
    made = write(upper / "usr/lib/made.txt", "new", age=1_700_000_000)
    (upper / "link").symlink_to("usr/lib/made.txt")
    settle.settle(upper, (), since=1_650_000_000)
    assert packaged.stat().st_mtime == 1_600_000_000
    assert made.stat().st_mtime == tree.content_time(tree.hash_file(made))
