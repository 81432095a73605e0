"""Removing what somebody else has made: however deep, and nothing beyond it."""

from __future__ import annotations

import os
from pathlib import Path

from relume.linux.files import remove_tree


def test_a_tree_of_any_depth_is_removed_and_nothing_beyond_it(tmp_path: Path) -> None:
    root, beyond = tmp_path / "tree", tmp_path / "beyond"
    beyond.mkdir()
    (beyond / "kept").touch()
    (root / "wide").mkdir(parents=True)
    for number in range(50):
        (root / "wide" / f"{number}/inner").mkdir(parents=True)
        (root / "wide" / f"{number}/inner/file").write_bytes(b"x")
    (root / "link").symlink_to(beyond)
    (root / "wide/link").symlink_to(beyond)
    os.mkfifo(root / "wide/fifo")
    here = os.open(root, os.O_RDONLY)
    for level in range(3000):
        os.mkdir("below", 0o000 if level % 7 == 3 and os.geteuid() == 0 else 0o700, dir_fd=here)
        inner = os.open("below", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
        if level % 500 == 0:
            os.symlink("/etc", "link", dir_fd=here)
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    remove_tree(root)
    assert list(tmp_path.iterdir()) == [beyond]
    assert (beyond / "kept").exists()
    assert Path("/etc/passwd").exists()


def test_a_tree_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path)
    remove_tree(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
