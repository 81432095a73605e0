"""One HTTP/1.0 request over a unix socket.

HTTP/1.0 because an answer then ends with its connection: no chunks, no reuse, nothing left to parse but a head, and a
stream is read as it comes. It is spoken to the node only, whose server knows it; ``relume call`` speaks to strangers
and uses http.client, which costs 28 ms to import, more than all the rest of the command.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 64 * 1024
_MAX_HEAD = 64 * 1024


class ConnectionLost(Exception):
    """The peer went away before its answer was whole, or answered with something else than HTTP."""


class Answer:
    """An answer's status, and its body as it arrives. Reading to the end closes the connection."""

    def __init__(self, connected: socket.socket, head: bytes, beginning: bytes) -> None:
        line, *fields = head.decode("latin-1").split("\r\n")
        version, _, rest = line.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ConnectionLost("not an HTTP answer")
        self.status = int(rest[:3])
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)
        }
        length = headers.get("content-length", "")
        self._left = int(length) if length.isdigit() else None
        self._connected, self._beginning = connected, beginning

    def __iter__(self) -> Iterator[bytes]:
        """Raises ConnectionLost where fewer bytes came than were announced."""
        left = self._left
        with self._connected:
            chunk = self._beginning or self._receive(left)
            while chunk:
                yield chunk
                left = left if left is None else left - len(chunk)
                chunk = self._receive(left)
        if left:
            raise ConnectionLost("the answer ended early")

    def _receive(self, left: int | None) -> bytes:
        try:
            return b"" if left == 0 else self._connected.recv(_CHUNK)
        except OSError as error:
            raise ConnectionLost(str(error)) from error


def request(path: Path, method: str, target: str, body: bytes | None = None) -> Answer:
    """Connect to the socket at ``path``, send a request, read the head of its answer.

    Raises OSError where nobody listens, ConnectionLost where nobody answers.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _connect(connected, path)
        return _exchange(connected, method, target, body)
    except BaseException:
        connected.close()
        raise


def _exchange(connected: socket.socket, method: str, target: str, body: bytes | None) -> Answer:
    head = f"{method} {target} HTTP/1.0\r\nHost: node\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    received = b""
    try:
        connected.sendall(f"{head}\r\n".encode("ascii") + (body or b""))
        while (end := received.find(b"\r\n\r\n")) < 0:
            chunk = connected.recv(_CHUNK)
            if not chunk or len(received) > _MAX_HEAD:
                raise ConnectionLost("no answer")
            received += chunk
    except OSError as error:
        raise ConnectionLost(str(error)) from error
    return Answer(connected, received[:end], received[end + 4 :])


def _connect(connected: socket.socket, path: Path) -> None:
    """sun_path holds 108 bytes (unix(7)); a longer path is reached through its folder's descriptor."""
    if len(os.fsencode(path)) < 108:
        connected.connect(str(path))
        return
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        connected.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
