"""TCP sockets of other processes, and repair mode (TCP_REPAIR of linux/tcp.h; CAP_NET_ADMIN in their namespace)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from relume.linux import syscall

_PIDFD_GETFD = 438
_TCP_REPAIR = 19
_OFF = 0


def end_repair(pid: int) -> int:
    """Take the sockets of ``pid`` out of repair mode, in which CRIU reads them; returns how many were in it.

    A CRIU that is killed leaves them there: every read and write answers EPERM then, and close(2) tells the
    other end nothing. Nothing happens to a process that is gone.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return 0
    found = 0
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            found += _end_one(process, link)
    except OSError:
        pass  # it ended meanwhile
    finally:
        os.close(process)
    return found


def _end_one(process: int, link: Path) -> bool:
    try:
        if not os.readlink(link).startswith("socket:"):
            return False
        copy = socket.socket(fileno=syscall.call(_PIDFD_GETFD, process, int(link.name), 0))
    except OSError:
        return False  # closed meanwhile
    with copy:
        if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
            return False
        try:
            if not copy.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR):
                return False
            copy.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _OFF)
        except OSError:
            return False  # another protocol than TCP, MPTCP or SCTP, has no such mode
        return True
