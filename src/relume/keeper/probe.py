"""The readiness probe: an HTTP GET that must answer 2xx, or a port that must accept.

It is made from inside the instance's namespace, and never while the instance is frozen: a connection that
waits in a listener's backlog makes the dump fail or is missing in the copy.
"""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import quote

import h11

_FIRST_PAUSE = 0.002
_LONGEST_PAUSE = 0.25
_GROWTH = 1.3
PATIENCE = 5.0
"""Seconds for a connection, and again for the answer: a dump that is asked for waits as long."""
_IN_URLS = "%/:?#[]@!$&'()*+,;="  # RFC 3986's reserved characters, and what is encoded already


class Pause:
    """Growing pauses between tries: quick at first, where a restored instance answers, then polite."""

    def __init__(self) -> None:
        self._next = _FIRST_PAUSE

    async def __call__(self) -> None:
        await asyncio.sleep(self._next)
        self._next = min(self._next * _GROWTH, _LONGEST_PAUSE)


async def answers(connection: socket.socket, endpoint: str, host: str) -> bool:
    """Whether ``GET endpoint`` over the connected socket answers 2xx within 5 s. Closes the socket.

    What a URL cannot hold (a space, an umlaut) is percent-encoded, as any client would.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            return 200 <= await _status(connection, endpoint, host) < 300
    except (OSError, h11.RemoteProtocolError):
        return False
    finally:
        connection.close()


async def _status(connection: socket.socket, endpoint: str, host: str) -> int:
    loop = asyncio.get_running_loop()
    http = h11.Connection(h11.CLIENT)
    headers = [("host", host), ("user-agent", "relume-probe"), ("connection", "close")]
    request = h11.Request(method="GET", target=quote(endpoint, safe=_IN_URLS), headers=headers)
    await loop.sock_sendall(connection, (http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await loop.sock_recv(connection, 16 * 1024))
        elif isinstance(event, h11.Response):
            return event.status_code
        elif isinstance(event, h11.ConnectionClosed):
            return 0
