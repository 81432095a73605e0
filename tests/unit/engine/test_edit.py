"""Edits of images, on images written here in CRIU's own format."""

from __future__ import annotations

import ipaddress
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from relume.engine import edit
from relume.errors import ImageError
from relume.images import read_image, write_image
from relume.images.proto import core_pb2, fdinfo_pb2, pstree_pb2, stats_pb2, userns_pb2


def words(address: str) -> list[int]:
    packed = ipaddress.ip_address(address).packed
    return list(struct.unpack(f"={len(packed) // 4}I", packed))


def socket(
    number: int, source: tuple[str, int], peer: tuple[str, int] | None, *, proto: int = 6, state: int = 1
) -> Any:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.INETSK, id=number)
    isk = entry.isk
    isk.id, isk.ino = number, 1000 + number
    isk.family = 10 if ":" in source[0] else 2
    isk.type, isk.proto, isk.state = (1 if proto == 6 else 2), proto, state
    isk.src_port, isk.dst_port = source[1], peer[1] if peer else 0
    isk.flags = isk.backlog = 0
    isk.src_addr[:] = words(source[0])
    isk.dst_addr[:] = words(peer[0] if peer else ("::" if isk.family == 10 else "0.0.0.0"))
    isk.fown.uid = isk.fown.euid = isk.fown.signum = isk.fown.pid_type = isk.fown.pid = 0
    for field in (
        "so_sndbuf",
        "so_rcvbuf",
        "so_snd_tmo_sec",
        "so_snd_tmo_usec",
        "so_rcv_tmo_sec",
        "so_rcv_tmo_usec",
    ):
        setattr(isk.opts, field, 0)
    return entry


def timer(number: int, *, ticks: int, value: int, interval: int) -> Any:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.TIMERFD, id=number)
    tfd = entry.tfd
    tfd.id, tfd.flags, tfd.clockid, tfd.ticks, tfd.settime_flags = number, 0, 1, ticks, 0
    tfd.vsec, tfd.vnsec, tfd.isec, tfd.insec = 0, value, interval, 5
    tfd.fown.uid = tfd.fown.euid = tfd.fown.signum = tfd.fown.pid_type = tfd.fown.pid = 0
    return entry


LISTENER = socket(1, ("0.0.0.0", 80), None, state=10)
INSIDE = [
    socket(2, ("127.0.0.1", 80), ("127.0.0.1", 4000)),
    socket(3, ("127.0.0.1", 4000), ("127.0.0.1", 80)),
]
MAPPED = [
    socket(4, ("::ffff:127.0.0.1", 81), ("::ffff:127.0.0.1", 4001)),
    socket(5, ("127.0.0.1", 4001), ("127.0.0.1", 81)),
]
POST = socket(6, ("169.254.169.253", 5000), ("169.254.169.253", 8234))
OUTSIDE6 = socket(7, ("fd00::2", 5001), ("fd00::1", 443), state=8)


def write(directory: Path, *entries: Any) -> Path:
    path = directory / "files.img"
    write_image(path, entries, kind="FILES")
    return path


def test_only_outside_connections_are_closed(tmp_path: Path) -> None:
    path = write(tmp_path, LISTENER, *INSIDE, *MAPPED, POST, OUTSIDE6)
    report = edit.prepare_images(tmp_path, loopback="keep")
    assert report == edit.EditReport(kept=4, closed=2, timers=0, needs_network=False)
    after = {entry.id: entry.isk for entry in read_image(path)}
    for number in (1, 2, 3, 4, 5):
        (before,) = [entry.isk for entry in (LISTENER, *INSIDE, *MAPPED) if entry.id == number]
        assert after[number] == before
    for number, addresses in ((6, 1), (7, 4)):
        assert (after[number].state, after[number].shutdown) == (7, 3)
        assert (after[number].src_port, after[number].dst_port) == (0, 0)
        assert list(after[number].src_addr) == list(after[number].dst_addr) == [0] * addresses
    assert edit.prepare_images(tmp_path, loopback="keep").closed == 0


def test_closing_all_is_left_to_criu(tmp_path: Path) -> None:
    path = write(tmp_path, LISTENER, *INSIDE, POST)
    before = path.read_bytes()
    assert edit.prepare_images(tmp_path, loopback="close") == edit.EditReport(closed=3)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "needs"),
    [
        (socket(1, ("0.0.0.0", 80), None, state=10), False),
        (socket(1, ("::", 80), None, state=10), False),
        (socket(1, ("10.0.2.100", 80), None, state=10), True),
        (socket(1, ("127.0.0.1", 99), ("127.0.0.53", 53), proto=17), False),
        (socket(1, ("10.0.2.100", 99), ("192.0.2.1", 53), proto=17), True),
        (socket(1, ("10.0.2.100", 99), ("192.0.2.1", 53)), False),
        (socket(1, ("::ffff:169.254.169.253", 99), None, proto=17), False),
    ],
)
@pytest.mark.parametrize("loopback", ["keep", "close"])
def test_sockets_that_need_the_network_first(tmp_path: Path, entry: Any, needs: bool, loopback: str) -> None:
    write(tmp_path, entry)
    assert edit.prepare_images(tmp_path, loopback=loopback).needs_network is needs


def test_only_forgotten_periodic_timers_are_armed(tmp_path: Path) -> None:
    timers = [
        timer(1, ticks=3, value=0, interval=1),  # expired and unread: the kernel forgot the rest
        timer(2, ticks=0, value=0, interval=1),  # disarmed by its owner
        timer(3, ticks=3, value=9, interval=1),
        timer(4, ticks=0, value=9, interval=1),
    ]
    path = write(tmp_path, *timers)
    assert edit.prepare_images(tmp_path, loopback="keep").timers == 1
    after = read_image(path)
    assert (after[0].tfd.vsec, after[0].tfd.vnsec) == (1, 5)
    assert after[1:] == timers[1:]


def test_ids_are_moved(tmp_path: Path) -> None:
    mapping = userns_pb2.userns_entry()
    for extents in (mapping.uid_map, mapping.gid_map):
        extents.add(first=0, lower_first=100_000, count=65536)
    write_image(tmp_path / "userns-9.img", [mapping], kind="USERNS")
    assert edit.remap_ids(tmp_path, id_base=300_000)
    assert not edit.remap_ids(tmp_path, id_base=300_000)
    (moved,) = read_image(tmp_path / "userns-9.img")
    assert [extent.lower_first for extent in (*moved.uid_map, *moved.gid_map)] == [300_000, 300_000]

    mapping.uid_map.add(first=65536, lower_first=500_000, count=1)
    write_image(tmp_path / "userns-9.img", [mapping], kind="USERNS")
    with pytest.raises(ImageError, match="several ranges"):
        edit.remap_ids(tmp_path, id_base=100_000)


def test_figures_of_a_dump(tmp_path: Path) -> None:
    entry = stats_pb2.stats_entry()
    entry.dump.freezing_time, entry.dump.frozen_time = 218, 139335
    entry.dump.memdump_time, entry.dump.memwrite_time = 3392, 1938
    entry.dump.pages_scanned, entry.dump.pages_skipped_parent, entry.dump.pages_written = 1000, 0, 900
    entry.dump.pages_lazy, entry.dump.shpages_scanned, entry.dump.shpages_written = 0, 50, 40
    write_image(tmp_path / "stats-dump", [entry], kind="STATS")
    assert edit.read_stats(tmp_path) == edit.DumpStats(218, 139335, 3392, 1938, 1050, 940)

    write_image(tmp_path / "stats-dump", [stats_pb2.stats_entry()], kind="STATS")
    with pytest.raises(ImageError, match="no figures"):
        edit.read_stats(tmp_path)


def zombie(directory: Path, name: str) -> None:
    """The images of process 5, which has ended."""
    write_image(
        directory / "pstree.img", [pstree_pb2.pstree_entry(pid=5, ppid=1, pgid=1, sid=1)], kind="PSTREE"
    )
    core = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    core.tc.task_state, core.tc.exit_code, core.tc.personality, core.tc.flags = 6, 0, 0, 0
    core.tc.blk_sigset, core.tc.comm = 0, name
    write_image(directory / "core-5.img", [core], kind="CORE")


def test_a_zombie_has_no_memory(tmp_path: Path) -> None:
    zombie(tmp_path, "gone")
    assert edit.processes(tmp_path) == [edit.Process(5, 1, "gone", 0, 0)]


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    """The kernel cuts a name after 15 bytes, in the middle of a letter too."""
    zombie(tmp_path, "@@")
    image = tmp_path / "core-5.img"
    image.write_bytes(image.read_bytes().replace(b"@@", b"a\xd0"))
    (process,) = edit.processes(tmp_path)
    assert os.fsencode(process.name) == b"a\xd0"
    json.dumps(process.name)
