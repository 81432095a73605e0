"""Connections that a dead CRIU left in repair mode work again."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys

import pytest

from relume.linux import syscall, tcp

_PIDFD_GETFD = 438
_TCP_REPAIR = 19

ECHO = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
other = socket.socketpair()
print(connection.fileno(), flush=True)
for line in sys.stdin:
    try:
        connection.sendall(line.encode())
        print("sent", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


def test_repair_ends() -> None:
    with (
        contextlib.ExitStack() as stack,
        socket.create_server(("127.0.0.1", 0)) as listener,
        subprocess.Popen(
            [sys.executable, "-c", ECHO, str(listener.getsockname()[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        connection, _ = listener.accept()
        stack.callback(connection.close)
        connection.settimeout(30)
        assert child.stdin is not None and child.stdout is not None
        number = int(child.stdout.readline())

        def send(text: str) -> str:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(f"{text}\n")
            child.stdin.flush()
            return child.stdout.readline().strip()

        assert send("before") == "sent"
        assert tcp.end_repair(child.pid) == 0
        process = os.pidfd_open(child.pid)
        with socket.socket(fileno=syscall.call(_PIDFD_GETFD, process, number, 0)) as held:
            held.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        os.close(process)
        assert send("lost") == str(errno.EINVAL)
        assert tcp.end_repair(child.pid) == 1
        assert send("after") == "sent"
        child.stdin.close()
        with connection.makefile() as lines:
            assert lines.read().split() == ["before", "after"]  # and its end of file
    assert tcp.end_repair(child.pid) == 0


@pytest.mark.parametrize("pid", [2, 1 << 22])
def test_nothing_to_end(pid: int) -> None:
    assert tcp.end_repair(pid) == 0
