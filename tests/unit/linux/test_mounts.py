"""Reading the mount table, and what overlay is told; mounting itself needs root and is tested end to end."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.linux import mounts


def mangled(path: bytes) -> bytes:
    """How the kernel writes a path (fs/seq_file.c, mangle_path with " \\t\\n\\\\#")."""
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path)


@given(st.binary(max_size=40).filter(lambda path: b"\0" not in path))
def test_every_path_comes_back(path: bytes) -> None:
    assert mounts._unescape(mangled(path)) == path


def table(monkeypatch: pytest.MonkeyPatch, *points: str) -> None:
    monkeypatch.setattr(mounts, "points", lambda: iter(map(Path, points)))


def test_our_own_table() -> None:
    points = list(mounts.points())
    assert Path("/proc") in points
    assert all(point.is_absolute() for point in points)


def test_under_is_at_or_below_and_deepest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, "/", "/run/a", "/run/a/b/c", "/run/ab", "/run/a/b", "/run/a")
    assert mounts.under(Path("/run/a")) == [
        Path("/run/a/b/c"),
        Path("/run/a/b"),
        Path("/run/a"),
        Path("/run/a"),  # one mounted over the other: as many times to unmount
    ]
    assert mounts.under(Path("/run/a/b/c/d")) == []
    assert len(mounts.under(Path("/"))) == 6


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT])
def test_unmounting_what_is_gone_already(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    table(monkeypatch, "/run/a", "/run/a/b")
    tried = []

    def unmount(point: Path) -> None:
        tried.append(point)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mounts, "unmount", unmount)
    mounts.unmount_all(Path("/run/a"))
    assert tried == [Path("/run/a/b"), Path("/run/a")]


def test_a_mount_that_stays_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    table(monkeypatch, "/run/a")

    def unmount(point: Path) -> None:
        raise PermissionError(errno.EPERM, "no", str(point))

    monkeypatch.setattr(mounts, "unmount", unmount)
    with pytest.raises(PermissionError):
        mounts.unmount_all(Path("/run/a"))


def test_overlay_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top first, as the kernel wants it; a state directory may have commas, colons and backslashes in it."""
    told: list[Any] = []
    monkeypatch.setattr(mounts, "mount", lambda *arguments: told.append(arguments))
    mounts.overlay(
        [Path("/bottom"), Path("/t:o,p\\")], Path("/u,p:"), Path("/w"), Path("/m"), options="index=on"
    )
    assert told == [
        (
            "overlay",
            Path("/m"),
            "overlay",
            0,
            r"lowerdir=/t\:o\,p\\:/bottom,upperdir=/u\,p:,workdir=/w,index=on",
        )
    ]


def test_a_failed_mount_says_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nonsense on") as failed:
        mounts.mount("none", tmp_path, "nonsense")
    assert failed.value.errno in (errno.ENODEV, errno.EPERM)
