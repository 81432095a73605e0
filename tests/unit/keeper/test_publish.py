"""The published port, against apps on loopback sockets."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from relume.keeper.publish import PublishedPort

App = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Published:
    """A published port in front of ``app``; ``dialled`` counts connections, ``responses`` first bytes out."""

    def __init__(self) -> None:
        self.dialled = 0
        self.responses = 0
        self.app_port = 0
        self.refuse = False
        self.port = PublishedPort(self._dial, self._responded)
        self.complaints: list[dict[str, Any]] = []
        self.serving = 0

    async def _dial(self) -> socket.socket:
        self.dialled += 1
        made = socket.socket()
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", self.app_port))
        except OSError:
            made.close()
            raise
        return made

    def _responded(self) -> None:
        self.responses += 1

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port.port)


@pytest.fixture
async def publish() -> AsyncIterator[Callable[[App | None], Awaitable[Published]]]:
    made: list[tuple[Published, asyncio.Server | None]] = []

    async def open_(app: App | None) -> Published:
        published = Published()
        server = None

        async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert app is not None
            published.serving += 1
            try:
                await app(reader, writer)
            except OSError:
                pass  # the caller is gone
            finally:
                writer.close()
                published.serving -= 1

        if app is not None:
            server = await asyncio.start_server(tracked, "127.0.0.1", 0, backlog=1024)
            published.app_port = server.sockets[0].getsockname()[1]
        else:
            with socket.create_server(("127.0.0.1", 0)) as gone:
                published.app_port = gone.getsockname()[1]
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: published.complaints.append(context)
        )
        await published.port.open()
        made.append((published, server))
        return published

    yield open_
    for published, server in made:
        await published.port.close()
        if server is not None:
            server.close()
        for _ in range(200):
            await asyncio.sleep(0.01)
            if not published.serving:
                break
        await asyncio.sleep(0.01)  # transports close one turn of the loop later
        assert not published.serving
        assert not published.complaints


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what it gets, at once; ends when the caller has ended."""
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()


async def test_both_ways_at_once_and_large(publish: Any) -> None:
    published = await publish(echo)
    reader, writer = await published.connect()
    content = random.Random(1).randbytes(32 << 20)

    async def send() -> None:
        for offset in range(0, len(content), 1 << 20):
            writer.write(content[offset : offset + (1 << 20)])
            await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    digest = hashlib.sha256()
    while piece := await reader.read(1 << 20):
        digest.update(piece)
    await sending
    writer.close()
    assert digest.digest() == hashlib.sha256(content).digest()
    assert published.responses == 1


async def test_half_close(publish: Any) -> None:
    """A caller that has said all still hears the answer: `nc -N`, HTTP/1.0 clients, a client's shutdown."""

    async def after_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.read()
        writer.write(b"you said " + said)
        writer.close()

    published = await publish(after_the_end)
    reader, writer = await published.connect()
    writer.write(b"hello")
    writer.write_eof()
    assert await reader.read() == b"you said hello"
    writer.close()


async def test_the_app_may_end_first(publish: Any) -> None:
    """Its half-close reaches the caller, and what the caller still says reaches the app."""
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def greets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        heard.set_result(await reader.read())
        writer.close()

    published = await publish(greets)
    reader, writer = await published.connect()
    assert await reader.read() == b"bye"
    writer.write(b"last words")
    writer.write_eof()
    assert await heard == b"last words"
    writer.close()


async def test_nobody_listens_inside(publish: Any) -> None:
    """A reset, as it would be without us; not an orderly end that reads like an empty answer."""
    published = await publish(None)
    reader, writer = await published.connect()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


@pytest.mark.parametrize("who", ["app", "caller"])
async def test_a_reset_goes_through(publish: Any, who: str) -> None:
    reset = struct.pack("ii", 1, 0)
    seen: asyncio.Future[BaseException | bytes] = asyncio.get_running_loop().create_future()

    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"begun")
        await writer.drain()
        if who == "app":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()
            return
        try:
            seen.set_result(await reader.read())
        except OSError as error:
            seen.set_result(error)
        writer.close()

    published = await publish(app)
    reader, writer = await published.connect()
    assert await reader.readexactly(5) == b"begun"
    if who == "caller":
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        writer.transport.abort()
        assert isinstance(await seen, ConnectionResetError)
    else:
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_hold_and_resume(publish: Any) -> None:
    """While it is held nobody is dialled; who is connected goes on; who came meanwhile is served after."""
    published = await publish(echo)
    before_reader, before_writer = await published.connect()
    before_writer.write(b"a")
    assert await before_reader.readexactly(1) == b"a"
    published.port.hold()
    late = [await published.connect() for _ in range(3)]
    for _, writer in late:
        writer.write(b"b")
    await asyncio.sleep(0.1)
    assert published.dialled == 1
    before_writer.write(b"c")
    assert await before_reader.readexactly(1) == b"c"
    published.port.resume()
    for reader, writer in late:
        assert await reader.readexactly(1) == b"b"
        writer.close()
    assert published.dialled == 4
    before_writer.close()


async def test_a_caller_that_does_not_read_slows_the_app_down(publish: Any) -> None:
    """Memory is bounded: an endless download waits for its reader instead of piling up in the keeper."""
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1 << 20

    published = await publish(endless)
    _, writer = await published.connect()
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.2)
    assert sent < 64 << 20
    writer.transport.abort()
    await asyncio.sleep(0.05)


async def test_many_connections(publish: Any) -> None:
    published = await publish(echo)

    async def one(number: int) -> bytes:
        reader, writer = await published.connect()
        writer.write(b"%d" % number)
        writer.write_eof()
        got: bytes = await reader.read()
        writer.close()
        return got

    async with asyncio.timeout(20):
        assert await asyncio.gather(*map(one, range(300))) == [b"%d" % number for number in range(300)]


async def test_close_resets_who_is_connected_and_who_waits(publish: Any) -> None:
    published = await publish(echo)
    connected = await published.connect()
    connected[1].write(b"x")
    await connected[0].readexactly(1)
    published.port.hold()
    waiting = await published.connect()
    await asyncio.sleep(0.05)
    await published.port.close()
    for reader, writer in (connected, waiting):
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            async with asyncio.timeout(2):
                await reader.readexactly(1)
        writer.close()
    with pytest.raises(ConnectionRefusedError):
        await published.connect()
