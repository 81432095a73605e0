"""The command ``python -m relume.pager``: as a keeper runs it, and in the place of ``criu lazy-pages``.

    python -m relume.pager --control FD [--keep FD]
    python -m relume.pager lazy-pages --images-dir DIR [--work-dir DIR] [--status-fd FD] [--log-file FILE] ...

The first waits for its job on the socket FD, everything imported, so that a start does not pay for Python; what it
sends to the other socket is said in :mod:`relume.pager.keepsake`.
The second serves one restore without learning anything, and exits 0 when all memory is served or gone.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from relume.errors import RelumeError
from relume.pager.holder import Board, hold
from relume.pager.job import Job
from relume.pager.keepsake import Keepsake
from relume.pager.server import STOPPED, UNTRUSTED, Pager, reason_of

_SWITCH_SECONDS = 0.0005
"""How long a thread may keep the GIL while another wants it: a fault must not wait for Python's 5 ms."""


def main(arguments: list[str]) -> int:
    """Runs the form that ``arguments`` ask for; returns the exit status."""
    gc.freeze()
    _prepare_limits()
    sys.setswitchinterval(_SWITCH_SECONDS)
    if arguments[:1] == ["lazy-pages"]:
        return _like_criu(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m relume.pager")
    parser.add_argument("--control", type=int, required=True, metavar="FD")
    parser.add_argument("--keep", type=int, metavar="FD")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="pager: %(message)s")
    keepsake = Keepsake(None if options.keep is None else socket.socket(fileno=options.keep))
    control = socket.socket(fileno=options.control)
    sending = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with sending:
            try:
                control.sendall(json.dumps(event).encode() + b"\n")
            except OSError:
                pass  # the keeper is gone; whoever comes after it asks the kernel, not us

    def serve(board: Board) -> int:
        line = _line(control)
        if not line:
            return 0  # not needed after all
        return _run(Pager(Job.parse(line), board, emit, control, keepsake), board)

    def report(reason: str) -> None:
        if reason == STOPPED:
            emit({"event": "gone", "reason": STOPPED})
        else:
            told = reason.removeprefix(UNTRUSTED)
            emit({"event": "failed", "reason": told, "untrusted": told != reason})

    return hold(serve, report)


def _prepare_limits() -> None:
    """A descriptor for each forked process. And not the first to die when memory runs out: the instance goes too."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        Path("/proc/self/oom_score_adj").write_text("-900")
    except OSError:
        pass  # needs CAP_SYS_RESOURCE; the holder acts if it comes to that


def _like_criu(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m relume.pager lazy-pages", allow_abbrev=False)
    parser.add_argument("-D", "--images-dir", type=Path, default=Path())
    parser.add_argument("-W", "--work-dir", type=Path)
    parser.add_argument("-o", "--log-file", type=Path)
    parser.add_argument("--status-fd", type=int)
    parser.add_argument("--threads", type=int, default=2)
    # Whatever else CRIU knows (verbosity, configuration) does not concern us.
    options, _ = parser.parse_known_args(arguments)
    images = options.images_dir.absolute()
    work_dir = (options.work_dir or images).absolute()
    target = work_dir / options.log_file if options.log_file else None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", filename=target)

    def emit(event: dict[str, Any]) -> None:
        logging.getLogger(__name__).info("%s", json.dumps(event))
        if event["event"] == "listening" and options.status_fd is not None:
            os.write(options.status_fd, b"\0")
            os.close(options.status_fd)

    def serve(board: Board) -> int:
        job = Job(images, work_dir, threads=options.threads, await_answer=False)
        return _run(Pager(job, board, emit, None), board)

    def report(reason: str) -> None:
        logging.getLogger(__name__).error(
            "Error: %s; the processes were killed", reason.removeprefix(UNTRUSTED)
        )

    return hold(serve, report)


def _run(pager: Pager, board: Board) -> int:
    gc.disable()  # nothing here makes cycles worth collecting, and a collection stops every thread
    try:
        return pager.run()
    except RelumeError as error:
        logging.getLogger(__name__).error("%s", error)
        board.explain(reason_of(error))
        return 1


def _line(control: socket.socket) -> str:
    """The first line from the socket, byte by byte, so that what follows it stays there."""
    received = b""
    while not received.endswith(b"\n"):
        byte = control.recv(1)
        if not byte:
            return ""
        received += byte
    return received.decode()
