"""``python -m relume.keeper FD [--store]``: the process that keepers are forked from (:mod:`relume.keeper.zygote`).

FD is a socket to the node. With --store their pagers have imported what a region's store needs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from setproctitle import setproctitle

from relume.engine.jobs import Container
from relume.engine.paging import PagerProcess
from relume.keeper import zygote
from relume.keeper.client import SOCKET
from relume.keeper.server import Server
from relume.linux import cgroup, process
from relume.pager import main as pager


def main() -> None:
    """Fork keepers until the node is gone."""
    cgroup.options()  # as they are before this node's first CRIU; keepers inherit the answer
    if "--store" in sys.argv[2:]:
        from relume.pager import remote  # noqa: F401  (half a second that nodes without a region are spared)
    zygote.serve(socket.socket(fileno=int(sys.argv[1])), become_keeper)


def become_keeper(container: Container) -> NoReturn:
    """Be the keeper of ``container`` to its end, with a pager that waits for its job."""
    setproctitle(f"relume.keeper {container.runtime}")
    process.set_name("relume-keeper")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what belongs to the node is not for us
    ours, theirs = socket.socketpair()
    keeps, gives = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()  # as long as there is no thread: the pager shares descriptors with its holder
    if pid == 0:
        ours.close()
        keeps.close()
        become_pager(container, theirs, gives)
    theirs.close()
    gives.close()
    os.umask(0o022)  # runc makes cgroups and mount points, and the mapped root must be able to look at them
    process.become_subreaper()
    waiting = PagerProcess(pid, ours, keeps)
    asyncio.run(Server(container, Path(container.runtime) / SOCKET, waiting).run())
    os._exit(0)


def become_pager(container: Container, control: socket.socket, gives: socket.socket) -> NoReturn:
    """Be the pager's holder, and its pager."""
    setproctitle(f"relume.pager {container.runtime}")
    process.set_name("relume-pager")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    status = pager.main(["--control", str(control.detach()), "--keep", str(gives.detach())])
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    main()
