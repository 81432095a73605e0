"""The readiness probe against servers that answer well, badly, and not at all."""

from __future__ import annotations

import asyncio
import socket

import pytest

from relume.keeper import probe


async def ask(answer: bytes | None, endpoint: str = "/ready") -> tuple[bool, bytes]:
    """(what the probe thinks, what it sent) of a server that says ``answer`` and closes; None never answers."""
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.readuntil(b"\r\n\r\n"))
        if answer is None:
            await done.wait()
        else:
            writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    connection = socket.create_connection(server.sockets[0].getsockname())
    connection.setblocking(False)
    try:
        return await probe.answers(connection, endpoint, "my-app"), await heard
    finally:
        assert connection.fileno() == -1
        done.set()
        server.close()


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", True),
        (b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 302 Found\r\nLocation: /login\r\n\r\n", False),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", False),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False),
        (b"HTTP/1.1 200", False),
        (b"", False),
    ],
)
async def test_answers(answer: bytes, ready: bool) -> None:
    assert (await ask(answer))[0] is ready


async def test_the_request() -> None:
    _, request = await ask(b"", "/ready?deep=1&name=%C3%A4")
    lines = request.lower().split(b"\r\n")
    assert lines[0] == b"get /ready?deep=1&name=%c3%a4 http/1.1"
    assert b"host: my-app" in lines
    assert b"connection: close" in lines


async def test_an_endpoint_that_no_url_can_hold_is_encoded() -> None:
    _, request = await ask(b"", "/prêt à\nservir")
    assert request.startswith(b"GET /pr%C3%AAt%20%C3%A0%0Aservir HTTP/1.1\r\n")


async def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PATIENCE", 0.1)
    async with asyncio.timeout(30):  # it would wait for ever
        assert not (await ask(None))[0]


async def test_pauses_grow_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    pause = probe.Pause()
    for _ in range(40):
        await pause()
    assert slept == sorted(slept)
    assert slept[0] <= 0.005 and slept[-1] == 0.25
    assert sum(slept[:10]) < 0.2  # a restored instance is asked often while it matters
