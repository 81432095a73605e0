"""What is changed in, and read from, CRIU's images between a dump and its restores.

:func:`prepare_images` is run once after the dump, so that every copy restores from the same files. Some
things in them would otherwise come back wrong, or not at all:

- **TCP connections to the outside**, dumped as established so that those inside survive. Restored so, the
  kernel probes a peer that does not know the connection, gets a reset, and a reader raises
  ConnectionResetError. Written as closed and shut down, they are what CRIU's own ``tcp-close`` makes: a
  reader sees end of file (http.client: RemoteDisconnected), at once, without a packet.
- **Periodic timerfds that had expired and were not read yet**: the kernel shows no time left for these
  (``it_value`` 0,0), CRIU writes that down, and 0,0 disarms. They get their interval as the time left.
- **Address space that was only reserved**, when it is larger than the machine's memory: it could not be
  mapped again.
- **Files that all instances share**: they change meanwhile, and another instance holds the locks on them. See
  _shared_files.py.
- **Unix sockets whose name is another by now**: bound by one name and renamed, which CRIU would bind by the old name,
  or linked to another, which it takes for deleted. They get the name that they have.
- **Files in /proc** of single threads, which are not there yet when files are opened. See _proc_files.py.

:func:`remap_ids` moves a container to another range of host ids. The rest only reads.

Times are as CRIU counts them (microseconds), sizes are bytes.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from relume.engine import _proc_files, _shared_files
from relume.errors import ImageError
from relume.images import read_image, read_pagemap, write_image

_TCP = 6
_PRIVATE_ANONYMOUS = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS of mman.h
_NORESERVE = 0x4000
_TASK_STOPPED = 0x3  # compel/include/uapi/task-state.h, COMPEL_TASK_STOPPED
_CLOSED = 7  # TCP_CLOSE of linux/tcp_states.h, as CRIU writes it
_LONGEST_SOCKET_NAME = 107  # sun_path of unix(7), and its NUL
_BOTH = 3  # sk_shutdown of sk-opts.proto
_SIDECAR = ipaddress.ip_address("169.254.169.253")
_V4_MAPPED = [0, 0, 0xFFFF0000]  # ::ffff:0:0/96 in network order, read as words of a little-endian machine


@dataclasses.dataclass(frozen=True, slots=True)
class EditReport:
    """How many ends of TCP connections were kept (both ends inside) and closed, and timers re-armed.

    ``needs_network``: some socket that stays has an address beyond loopback, its own or its peer's (a
    connected UDP socket, a listener on one interface). CRIU binds and connects it again, which fails where
    the address or the route is not there yet: set up a copy's network before its sockets are restored.
    ``warnings`` are sentences for the answer to the app: what no copy will have.
    """

    kept: int = 0
    closed: int = 0
    timers: int = 0
    needs_network: bool = False
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class DumpStats:
    """CRIU's ``stats-dump``: microseconds, and pages of 4096 bytes.

    ``frozen_us`` is the whole stop of the app, ``memdump_us`` and ``memwrite_us`` are parts of it.
    """

    freezing_us: int
    frozen_us: int
    memdump_us: int
    memwrite_us: int
    pages_scanned: int
    pages_written: int


@dataclasses.dataclass(frozen=True, slots=True)
class Process:
    """A process in the images. ``memory_bytes`` is what the images hold of it; 0 for a zombie."""

    pid: int
    ppid: int
    name: str
    threads: int
    memory_bytes: int


def prepare_images(
    directory: Path, *, loopback: str, shared: Collection[str] = (), sockets: Mapping[str, str] | None = None
) -> EditReport:
    """Make the images in ``directory`` right for copies; ``loopback`` is "keep" or "close".

    "keep": dumped and to be restored with ``tcp-established``. "close": with ``tcp-close``, which ends all
    connections by itself. ``shared`` are the mount points inside behind which all instances have the same files,
    ``sockets`` the names of unix sockets (of a HeldReport).
    Doing it twice changes nothing more, but warns only once. Raises ImageError.
    """
    for memory in directory.glob("mm-*.img"):
        _reserve_without_account(memory)
    path = directory / "files.img"
    files = read_image(path)
    inet = [file.isk for file in files if file.HasField("isk")]
    connections = [each for each in inet if each.proto == _TCP and each.dst_port]
    outside = _outside(connections) if loopback == "keep" else []
    stopped = [file.tfd for file in files if file.HasField("tfd") and _is_stopped(file.tfd)]
    for socket in outside:
        _close(socket)
    for timer in stopped:
        timer.vsec, timer.vnsec = timer.isec, timer.insec
    everyones = _shared_files.select(directory, files, shared) if shared else {}
    warnings = _shared_files.unlock(directory, everyones)
    loosened = _shared_files.loosen(directory, everyones)
    renamed, of_threads = _proc_files.redirect(directory, files)
    named = _name([file.usk for file in files if file.HasField("usk")], sockets or {})
    if outside or stopped or loosened or renamed or named:
        write_image(path, files)
    kept = len(connections) - len(outside) if loopback == "keep" else 0
    closed = len(outside) if loopback == "keep" else len(connections)
    gone = {id(each) for each in (outside if loopback == "keep" else connections)}
    beyond = any(_is_beyond(each) for each in inet if id(each) not in gone)
    return EditReport(kept, closed, len(stopped), needs_network=beyond, warnings=(*warnings, *of_threads))


def remap_ids(directory: Path, *, id_base: int) -> bool:
    """Let a restore use the host ids from ``id_base`` on; False if the images have that mapping already.

    Every other image has ids as seen inside, so this is the one place (criu/namespaces.c, userns_uid).
    The images' files must then be readable by ``id_base``, and the layers be mounted with the same mapping.
    Raises ImageError for a mapping that is not one range from 0 on.
    """
    changed = False
    for path in directory.glob("userns-*.img"):
        entries = read_image(path)
        for extents in ([*entry.uid_map, *entry.gid_map] for entry in entries):
            for extent in extents:
                if extent.first != 0:
                    raise ImageError(
                        f"{path}: a user namespace of several ranges", hint="take a new checkpoint"
                    )
                changed = changed or extent.lower_first != id_base
                extent.lower_first = id_base
        write_image(path, entries)
    return changed


def read_stats(work: Path) -> DumpStats:
    """The figures of a dump; ``work`` is its work directory (not that of the images). Raises ImageError."""
    path = work / "stats-dump"
    entries = read_image(path)
    if not entries or not entries[0].HasField("dump"):
        raise ImageError(f"{path}: no figures of a dump", hint="the dump did not end well")
    dump = entries[0].dump
    return DumpStats(
        freezing_us=dump.freezing_time,
        frozen_us=dump.frozen_time,
        memdump_us=dump.memdump_time,
        memwrite_us=dump.memwrite_time,
        pages_scanned=dump.pages_scanned + dump.shpages_scanned,
        pages_written=dump.pages_written + dump.shpages_written,
    )


def processes(directory: Path) -> list[Process]:
    """The process tree in the images, parents first. Raises ImageError."""
    found = []
    for item in read_image(directory / "pstree.img"):
        core = read_image(directory / f"core-{item.pid}.img")[0]
        has_memory = (directory / f"pagemap-{item.pid}.img").exists()
        extents = read_pagemap(directory, item.pid).extents if has_memory else ()
        found.append(
            Process(
                pid=item.pid,
                ppid=item.ppid,
                name=os.fsdecode(core.tc.comm),  # bytes where they are no UTF-8
                threads=len(item.threads),
                memory_bytes=sum(extent.length for extent in extents),
            )
        )
    return found


def stopped(directory: Path) -> list[int]:
    """Pids (as inside) of the processes that were stopped by a signal when the dump began. Raises ImageError."""
    return [
        item.pid
        for item in read_image(directory / "pstree.img")
        if read_image(directory / f"core-{item.pid}.img")[0].tc.task_state == _TASK_STOPPED
    ]


def _outside(connections: Sequence[Any]) -> list[Any]:
    """Those whose other end is not among them."""
    ends = {
        (_address(each.src_addr), each.src_port, _address(each.dst_addr), each.dst_port)
        for each in connections
    }
    return [
        each
        for each in connections
        if (_address(each.dst_addr), each.dst_port, _address(each.src_addr), each.src_port) not in ends
    ]


def _address(words: Sequence[int]) -> tuple[int, ...]:
    """An address to compare: an IPv4 one has one form, however the socket was made."""
    known = list(words)
    return tuple(known[3:] if known[:3] == _V4_MAPPED else known)


def _is_beyond(socket: Any) -> bool:
    """Whether an address of it is on no loopback interface; every instance's has 127/8 and the sidecar's."""
    for words in (socket.src_addr, socket.dst_addr):
        address = _address(words)
        packed = struct.pack(f"={len(address)}I", *address)
        known = ipaddress.ip_address(packed)
        if not (known.is_unspecified or known.is_loopback or known == _SIDECAR):
            return True
    return False


def _close(socket: Any) -> None:
    """Make a connected socket a new one that was shut down both ways. Its queues' image stays, unread."""
    socket.state = _CLOSED
    socket.src_port = socket.dst_port = 0
    socket.src_addr[:] = [0] * len(socket.src_addr)
    socket.dst_addr[:] = [0] * len(socket.dst_addr)
    socket.shutdown = _BOTH


def _name(entries: Sequence[Any], sockets: Mapping[str, str]) -> bool:
    """Give unix sockets the names that they have, and connections that of their listener."""
    names: dict[bytes, bytes] = {}
    for entry in entries:
        path = unquote_to_bytes(sockets.get(str(entry.ino), ""))
        if 0 < len(path) <= _LONGEST_SOCKET_NAME and entry.name != path + b"\0":
            names[entry.name] = path + b"\0"
    for entry in entries:
        if entry.name in names:
            entry.name, entry.deleted = names[entry.name], False
            entry.ClearField("name_dir")
    return bool(names)


def _reserve_without_account(path: Path) -> None:
    """Let CRIU map what a process had only reserved (PROT_NONE), however large, as a database's buffer pool may be.

    CRIU maps all private memory writable for a moment (criu/mem.c, premap_private_vma). The kernel counts a
    reservation as soon as it is writable, unless it was made with MAP_NORESERVE, and refuses one that is
    larger than memory and swap together ("Unable to map ANON_VMA: Cannot allocate memory").
    """
    entries = read_image(path)
    reserved = [
        vma
        for mm in entries
        for vma in mm.vmas
        if vma.prot == 0 and vma.flags & _PRIVATE_ANONYMOUS == _PRIVATE_ANONYMOUS
        if not vma.flags & _NORESERVE
    ]
    for vma in reserved:
        vma.flags |= _NORESERVE
    if reserved:
        write_image(path, entries)


def _is_stopped(timer: Any) -> bool:
    return bool(timer.ticks and not (timer.vsec or timer.vnsec) and (timer.isec or timer.insec))
