"""The cache: bounded, oldest out first, pinned ones never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relume.errors import StoreError
from relume.store.cache import Cache

MIB = 1 << 20


def add(cache: Cache, name: str, mib: int, used_at: float) -> None:
    with cache.add(name, lambda directory: (directory / "pages").write_bytes(b"x" * mib * MIB) and None):
        pass
    os.utime(cache.root / name / "pin", (used_at, used_at))


def test_the_one_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 10 * MIB)
    for at, name in enumerate(("a", "b", "c")):
        add(cache, name, 2, used_at=1000.0 + at)
    pin = cache.pin("a")
    assert pin is not None
    pin.close()  # used now
    cache.make_room(5 * MIB)
    assert [entry.id for entry in cache.entries()] == ["c", "a"]
    assert not list(cache.root.glob(".*"))


def test_a_pinned_entry_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 5 * MIB)
    add(cache, "old", 2, used_at=1.0)
    add(cache, "new", 2, used_at=2.0)
    pin = cache.pin("old")
    assert pin is not None
    assert not cache.evict("old")
    with pytest.raises(StoreError, match="no room"):
        cache.make_room(4 * MIB)
    assert [entry.id for entry in cache.entries()] == ["old"]
    pin.close()
    cache.make_room(4 * MIB)
    assert cache.entries() == []


def test_a_pin_ends_with_its_process(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", MIB)
    add(cache, "a", 1, used_at=1.0)
    code = (
        "import sys; from pathlib import Path; from relume.store.cache import Cache; "
        f"pin = Cache(Path({str(cache.root)!r}), 1).pin('a'); print('pinned', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"pinned\n"
        assert not cache.evict("a")
        other.kill()
    assert cache.evict("a")


def test_what_a_crash_left_is_swept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", MIB)
    for name in (".making-x", ".trash-y"):
        (cache.root / name).mkdir()
    cache.sweep()
    assert list(cache.root.iterdir()) == []


def test_of_two_who_add_the_same_one_wins(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", MIB)

    def slow(directory: Path) -> None:
        (directory / "who").write_text("late")
        with cache.add("a", lambda inner: (inner / "who").write_text("early") and None):
            pass

    with cache.add("a", slow) as pin:
        assert (pin.directory / "who").read_text() == "early"
    assert [path.name for path in cache.root.iterdir()] == ["a"]


def test_a_partial_entry_does_not_outlive_the_boot(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100 * MIB)
    for name in ("whole", "partial"):
        add(cache, name, 1, used_at=1.0)
    cache.mark_complete(cache.root / "whole")
    for name in ("whole", "partial"):
        (cache.root / name / "boot").write_text("another boot")
    pin = cache.pin("whole")
    assert pin is not None
    pin.close()
    assert cache.pin("partial") is None
    assert [entry.id for entry in cache.entries()] == ["whole"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", MIB)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.add("a", fail)
    assert list(cache.root.iterdir()) == []
    assert cache.pin("a") is None
