"""Which message an image file holds, by its magic number.

Source: CRIU's ``criu/include/magic.h`` and ``lib/pycriu/images/images.py`` (4.2.1). Modules of generated
code are imported when a file of their kind is first read: the whole set costs some 40 ms.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

COMMON = 0x54564319
SERVICE = 0x55105940
"""Since images version 1.1 a file begins with one of these, then its own magic; inventory has only its own."""


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of image: its name in CRIU's magic.h, its messages, and the raw data behind each.

    ``head`` is the message type of the first entry where that differs from the others'. ``extra`` gives
    the number of raw bytes that follow an entry, None where there are never any.
    """

    name: str
    magic: int
    module: str
    message: str
    head: str = ""
    extra: Callable[[Any], int] | None = None

    @property
    def prefix(self) -> int | None:
        """The magic that comes before its own, if one does."""
        if self.name == "INVENTORY":
            return None
        return SERVICE if self.name in ("STATS", "IRMAP_CACHE") else COMMON

    def message_type(self, position: int) -> type[Message]:
        """The generated class of the entry at ``position`` (0 is the first)."""
        module = importlib.import_module(f"relume.images.proto.{self.module}_pb2")
        found: type[Message] = getattr(module, self.head if self.head and position == 0 else self.message)
        return found


def _bytes_in_pipe(entry: Any) -> int:
    return int(entry.bytes)


def _queued(entry: Any) -> int:
    return int(entry.length)


def _in_tcp_queues(entry: Any) -> int:
    return int(entry.inq_len) + int(entry.outq_len)


_FORMATS = (
    Format("INVENTORY", 0x58313116, "inventory", "inventory_entry"),
    Format("PSTREE", 0x50273030, "pstree", "pstree_entry"),
    Format("FDINFO", 0x56213732, "fdinfo", "fdinfo_entry"),
    Format("FILES", 0x56303138, "fdinfo", "file_entry"),
    Format("PAGEMAP", 0x56084025, "pagemap", "pagemap_entry", head="pagemap_head"),
    Format("CORE", 0x55053847, "core", "core_entry"),
    Format("IDS", 0x54432030, "core", "task_kobj_ids_entry"),
    Format("MM", 0x57492820, "mm", "mm_entry"),
    Format("CREDS", 0x54023547, "creds", "creds_entry"),
    Format("FS", 0x51403912, "fs", "fs_entry"),
    Format("REG_FILES", 0x50363636, "regfile", "reg_file_entry"),
    Format("EXT_FILES", 0x59255641, "ext_file", "ext_file_entry"),
    Format("REMAP_FPATH", 0x59133954, "remap_file_path", "remap_file_path_entry"),
    Format("UTSNS", 0x54473203, "utsns", "utsns_entry"),
    Format("USERNS", 0x55474906, "userns", "userns_entry"),
    Format("TIMENS", 0x43114433, "timens", "timens_entry"),
    Format("PIDNS", 0x61157326, "pidns", "pidns_entry"),
    Format("NETNS", 0x55933752, "netdev", "netns_entry"),
    Format("NETDEV", 0x57373951, "netdev", "net_device_entry"),
    Format("MNTS", 0x55563928, "mnt", "mnt_entry"),
    Format("CGROUP", 0x59383330, "cgroup", "cgroup_entry"),
    Format("SECCOMP", 0x64413049, "seccomp", "seccomp_entry"),
    Format("APPARMOR", 0x59423047, "apparmor", "apparmor_entry"),
    Format("CPUINFO", 0x61404013, "cpuinfo", "cpuinfo_entry"),
    Format("IPC_VAR", 0x53115007, "ipc_var", "ipc_var_entry"),
    Format("UNIXSK", 0x54373943, "sk_unix", "unix_sk_entry"),
    Format("INETSK", 0x56443851, "sk_inet", "inet_sk_entry"),
    Format("TCP_STREAM", 0x51465506, "tcp_stream", "tcp_stream_entry", extra=_in_tcp_queues),
    Format("SK_QUEUES", 0x56264026, "sk_packet", "sk_packet_entry", extra=_queued),
    Format("PIPES_DATA", 0x56453709, "pipe_data", "pipe_data_entry", extra=_bytes_in_pipe),
    Format("FIFO_DATA", 0x59333054, "pipe_data", "pipe_data_entry", extra=_bytes_in_pipe),
    Format("PIPES", 0x56513555, "pipe", "pipe_entry"),
    Format("FIFO", 0x58364939, "fifo", "fifo_entry"),
    Format("TTY_INFO", 0x59453036, "tty", "tty_info_entry"),
    Format("TTY_FILES", 0x59433025, "tty", "tty_file_entry"),
    Format("FILE_LOCKS", 0x54323616, "file_lock", "file_lock_entry"),
    Format("TIMERFD", 0x50493712, "timerfd", "timerfd_entry"),
    Format("EVENTFD_FILE", 0x44523722, "eventfd", "eventfd_file_entry"),
    Format("EVENTPOLL_FILE", 0x45023858, "eventpoll", "eventpoll_file_entry"),
    Format("SIGNALFD", 0x57323820, "signalfd", "signalfd_entry"),
    Format("INOTIFY_FILE", 0x48424431, "fsnotify", "inotify_file_entry"),
    Format("MEMFD_INODE", 0x48453499, "memfd", "memfd_inode_entry"),
    Format("STATS", 0x57093306, "stats", "stats_entry"),
)

BY_MAGIC = {known.magic: known for known in _FORMATS}
BY_NAME = {known.name: known for known in _FORMATS}
