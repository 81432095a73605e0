"""The instance's log: every byte, where it began, rotation at line ends, and disks that are full."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.keeper.log import RELUME, STDERR, STDOUT, Log, times_of


def rows(path: Path) -> list[tuple[int, str]]:
    """(offset, stream) of each line of the time stamps."""
    return [
        (int(offset), stream) for offset, _, stream in map(str.split, times_of(path).read_text().splitlines())
    ]


def test_bytes_as_they_came_and_where_each_piece_began(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", limit=1 << 20)
    log.write(b"one\n", RELUME)
    log.write(b"\xff\x00 no line end", STDOUT)
    log.write(b"", STDOUT)
    log.write(b"three\n", STDERR)
    log.close()
    assert (tmp_path / "log").read_bytes() == b"one\n\xff\x00 no line endthree\n"
    assert rows(tmp_path / "log") == [(0, RELUME), (4, STDOUT), (18, STDERR)]
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_second_writer_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    for _ in range(2):
        log = Log(tmp_path / "log", limit=1 << 20)
        log.write(b"line\n", STDOUT)
        log.close()
    assert rows(tmp_path / "log") == [(0, STDOUT), (5, STDOUT)]


def test_rotation_waits_for_the_end_of_the_line(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", limit=10)
    log.write(b"0123456789 and ", STDOUT)
    log.write(b"more\nnext\n", STDERR)
    log.close()
    assert (tmp_path / "log.1").read_bytes() == b"0123456789 and more\n"
    assert (tmp_path / "log").read_bytes() == b"next\n"
    assert (tmp_path / "log.times.1").read_text().split()[::3] == ["0", "15"]
    assert rows(tmp_path / "log") == [(0, STDERR)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1", "log.times", "log.times.1"]


def test_a_line_without_an_end_is_cut_in_the_end(tmp_path: Path) -> None:
    """A progress bar that never ends its line must not fill the disk."""
    log = Log(tmp_path / "log", limit=100)
    for _ in range(1000):
        log.write(b"." * 10, STDOUT)
    log.close()
    sizes = [(tmp_path / name).stat().st_size for name in ("log", "log.1")]
    assert max(sizes) <= 200


@given(st.lists(st.binary(max_size=60) | st.just(b"line\n"), max_size=30), st.integers(1, 80))
def test_what_is_kept_is_the_end_of_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], limit: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    log = Log(path, limit=limit)
    for piece in pieces:
        log.write(piece, STDOUT)
    log.close()
    old = path.with_name("log.1").read_bytes() if path.with_name("log.1").exists() else b""
    now = path.read_bytes()
    assert b"".join(pieces).endswith(old + now)
    assert len(now) <= 2 * limit + 60
    assert all(0 <= offset < len(now) for offset, _ in rows(path))


@pytest.mark.parametrize("full", ["log", "log.times"])
def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path, full: str) -> None:
    """/dev/full answers every write with ENOSPC (full(4))."""
    (tmp_path / full).symlink_to("/dev/full")
    log = Log(tmp_path / "log", limit=10)
    for _ in range(5):
        log.write(b"a line that is longer than the limit\n", STDOUT)
    log.close()


def test_a_disk_that_has_room_again(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(path, limit=1 << 20)
    log.write(b"before\n", STDOUT)
    kept = os.dup(log._raw)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._raw)
    log.write(b"lost\n", STDOUT)
    os.dup2(kept, log._raw)
    log.write(b"after\n", STDOUT)
    log.close()
    os.close(kept)
    os.close(full)
    assert path.read_bytes() == b"before\nafter\n"
    assert rows(path)[-1] == (7, STDOUT)


def test_no_descriptor_left_for_a_rotation(tmp_path: Path) -> None:
    """It goes on in the old files; and never writes to a descriptor that is somebody else's by now."""
    log = Log(tmp_path / "log", limit=10)
    log.write(b"0123456789\n", STDOUT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        log.write(b"more\n", STDOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tmp_path / "log").read_bytes() == b"0123456789\nmore\n"
    log.write(b"end\nnew\n", STDOUT)
    log.close()
    assert (tmp_path / "log.1").read_bytes() == b"0123456789\nmore\nend\n"
    assert (tmp_path / "log").read_bytes() == b"new\n"


def test_a_log_that_somebody_removed(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", limit=10)
    log.write(b"0123456789\n", STDOUT)
    (tmp_path / "log").unlink()
    log.write(b"\nnew\n", STDOUT)
    log.close()
    assert (tmp_path / "log").read_bytes() == b"new\n"


def test_the_time_stamps_of_many_small_pieces_are_bounded_too(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", limit=1000)
    for number in range(2000):
        log.write(b"." if number % 10 else b"\n", STDOUT)
    log.close()
    log = Log(tmp_path / "log", limit=1000)  # a second writer knows how much there is
    for _ in range(60):
        log.write(b"\n", STDOUT)
    log.close()
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 2100
