"""What a check asks an instance with: HTTP or plain bytes, at the instance's published address."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

#: Seconds. Restored memory may still be on its way for the first answer of a large app.
TIMEOUT = 60.0


@dataclass(frozen=True)
class Ask:
    """One instance. ``drawn`` is shared by all instances of an app: what ``unique`` has seen so far."""

    url: str
    drawn: dict[str, set[object]] = field(default_factory=dict)

    @property
    def host(self) -> str:
        return str(urlsplit(self.url).hostname)

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None, self.url
        return port

    def request(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """GET, or POST with a body; the status and the body. A connection of its own each time."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT)
        try:
            connection.request("GET" if body is None else "POST", path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def status(self, path: str, body: bytes | None = None) -> int:
        return self.request(path, body)[0]

    def get(self, path: str, body: bytes | None = None) -> bytes:
        """The body of a 200 answer."""
        status, answer = self.request(path, body)
        assert status == 200, f"{path}: HTTP {status}: {answer[:500]!r}"
        return answer

    def json(self, path: str, arguments: dict[str, Any] | None = None) -> Any:
        """The JSON of a 200 answer; with ``arguments`` a POST of them."""
        return json.loads(self.get(path, None if arguments is None else json.dumps(arguments).encode()))

    def raw(self, data: bytes, *, idle: float) -> bytes:
        """Send ``data`` over TCP; what comes back until nothing did for ``idle`` seconds."""
        answer = bytearray()
        with socket.create_connection((self.host, self.port), timeout=TIMEOUT) as connection:
            connection.sendall(data)
            while True:
                try:
                    part = connection.recv(65536)
                except TimeoutError:
                    break
                if not part:
                    break
                answer += part
                connection.settimeout(idle)
        return bytes(answer)

    def unique(self, what: str, value: object) -> None:
        """``value`` was drawn by this instance's generator ``what``: no other instance may draw it too."""
        seen = self.drawn.setdefault(what, set())
        assert value not in seen, f"two instances draw the same from {what}: {value}"
        seen.add(value)
