"""The digest of a tree: what it covers, and what it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.build import tree


def make(root: Path) -> Path:
    (root / "bin").mkdir(parents=True)
    (root / "bin/run").write_bytes(b"#!/bin/sh\n")
    (root / "bin/run").chmod(0o755)
    (root / "bin/link").symlink_to("run")
    (root / "empty").mkdir()
    (root / "data").write_bytes(b"x" * 3_000_000)
    return root


def test_same_content_elsewhere_and_at_another_time(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "far" / "other")
    for path in other.rglob("*"):
        os.utime(path, (5, 5), follow_symlinks=False)
    assert tree.digest(one) == tree.digest(other)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda root: (root / "data").write_bytes(b"x" * 2_999_999 + b"y"),
    "length": lambda root: (root / "data").write_bytes(b"x" * 2_999_999),
    "mode": lambda root: (root / "bin/run").chmod(0o750),
    "mode of a directory": lambda root: (root / "empty").chmod(0o700),
    "mode of the root": lambda root: root.chmod(0o700),
    "name": lambda root: (root / "data").rename(root / "date"),
    "empty directory": lambda root: (root / "empty").rmdir(),
    "new file": lambda root: (root / "empty/x").touch(),
    "link": lambda root: ((root / "bin/link").unlink(), (root / "bin/link").symlink_to("ran")),
    "link for a file": lambda root: (
        (root / "bin/link").unlink(),
        (root / "bin/link").write_bytes((root / "bin/run").read_bytes()),
    ),
    "hard link": lambda root: (root / "bin/again").hardlink_to(root / "bin/run"),
    "fifo": lambda root: os.mkfifo(root / "bin/pipe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(tmp_path: Path, change: str) -> None:
    root = make(tmp_path / "root")
    before = tree.digest(root)
    CHANGES[change](root)
    assert tree.digest(root) != before


def test_a_hard_link_is_not_a_copy(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    (one / "bin/again").hardlink_to(one / "bin/run")
    (other / "bin/again").write_bytes((other / "bin/run").read_bytes())
    (other / "bin/again").chmod(0o755)
    assert tree.digest(one) != tree.digest(other)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    name = os.fsdecode(b"caf\xe9\n")
    (tmp_path / "root" / name).write_bytes(b"")
    assert len(tree.digest(tmp_path / "root")) == 64


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_times_follow_content(one: bytes, other: bytes) -> None:
    from blake3 import blake3

    first, second = (tree.content_time(blake3(data).digest()) for data in (one, other))
    assert (first == second) == (one == other)  # 2^29 times: a collision in a test run is not to be expected
    assert tree.EPOCH <= first < 2**31


def test_hashing_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("secret")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match="symbolic links"):
        tree.hash_file(tmp_path / "link")


def test_hashing_can_be_interrupted(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(3 << 20))

    def stop() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        tree.hash_file(tmp_path / "large", stop)
