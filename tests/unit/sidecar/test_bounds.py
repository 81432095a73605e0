"""The sidecar's bounds: size, time, connections; and callers that leave."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import struct
import time
from typing import Any

import pytest

POST = b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 0\r\n\r\n"


def code(raw: bytes) -> tuple[int, str]:
    """Status and error code of the one answer in ``raw``."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "beginning",
    [
        b"P",
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\n",
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\n",
        b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n",
        POST + b"POST /chec",
    ],
    ids=["first byte", "in the head", "before the body", "in a chunk", "behind another request"],
)
async def test_slow_loris(serve: Any, beginning: bytes) -> None:
    """A byte now and then moves no deadline: 408 when the time is over, however lively the caller seems."""
    served = await serve(read_s=0.4, idle_s=30.0)
    reader, writer = await served.connect()
    began = time.monotonic()
    writer.write(beginning)

    async def drip() -> None:
        while True:
            await asyncio.sleep(0.05)
            writer.write(b"x")

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(30):  # a limit that each byte moved would never come
        raw = await reader.readuntil(b"}}\n")
    took = time.monotonic() - began
    dripping.cancel()
    writer.close()
    assert code(raw[raw.rindex(b"HTTP/1.1 ") :]) == (408, "timeout")
    assert took > 0.3


async def test_head_and_body_share_one_time_limit(serve: Any) -> None:
    served = await serve(read_s=0.6)
    soonest = math.inf
    for _ in range(5):  # a busy machine only ever adds to it; with two limits it would be 1.0 at least
        reader, writer = await served.connect()
        began = time.monotonic()
        writer.write(b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n")
        await asyncio.sleep(0.4)
        writer.write(b"\r\nabc")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()
        soonest = min(soonest, time.monotonic() - began)
        if soonest < 0.9:
            return
    raise AssertionError(soonest)


async def test_an_idle_connection_ends_quietly(serve: Any) -> None:
    served = await serve(idle_s=0.1)
    reader, writer = await served.connect()
    assert await reader.read() == b""
    writer.close()


async def test_a_gigabyte_is_refused_at_once(serve: Any) -> None:
    """By its Content-Length, before any of it is read; and the caller, who is still sending, reads why."""
    served = await serve()
    reader, writer = await served.connect()
    writer.write(b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nContent-Length: 1073741824\r\n\r\n")
    writer.write(bytes(4 << 20))
    async with asyncio.timeout(30):
        assert code(await reader.readuntil(b"}}\n")) == (413, "body_too_large")
    writer.close()
    assert served.asked == 0


async def test_a_body_of_unknown_size_is_cut_off(serve: Any) -> None:
    served = await serve(body_bytes=1000)
    reader, writer = await served.connect()
    writer.write(b"POST /checkpoint HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(11):
        writer.write(b"64\r\n" + bytes(100) + b"\r\n")
    async with asyncio.timeout(30):
        assert code(await reader.readuntil(b"}}\n")) == (413, "body_too_large")
    writer.close()
    assert served.asked == 0


async def test_a_large_head(serve: Any) -> None:
    served = await serve(header_bytes=4096)
    reader, writer = await served.connect()
    writer.write(b"GET /status HTTP/1.1\r\nHost: s\r\nCookie: " + b"x" * 100_000)
    async with asyncio.timeout(30):
        assert code(await reader.readuntil(b"}}\n")) == (431, "header_too_large")
    writer.close()


async def test_200_posts_at_once(serve: Any) -> None:
    """All wait together, and each gets an answer."""
    served = await serve()
    served.gate.clear()
    calls = [asyncio.create_task(served.exchange(POST)) for _ in range(200)]
    await served.until(lambda: served.asked == 200)
    served.gate.set()
    assert {raw.split(b"\r\n")[0] for raw in await asyncio.gather(*calls)} == {b"HTTP/1.1 200 OK"}


async def test_more_connections_than_allowed(serve: Any) -> None:
    """The one too many is told so; a place that gets free is used again."""
    served = await serve(connections=3)
    held = [await served.connect() for _ in range(3)]
    await asyncio.sleep(0.05)
    assert code(await served.exchange(POST)) == (503, "too_many_connections")
    held[0][1].close()
    await asyncio.sleep(0.05)
    assert (await served.exchange(POST)).startswith(b"HTTP/1.1 200 ")
    for _, writer in held[1:]:
        writer.close()


async def test_a_flood_of_connections_is_dropped(serve: Any) -> None:
    """Those that are being told why are bounded, too: a keeper must not run out of descriptors."""
    served = await serve(connections=2)
    held = [await served.connect() for _ in range(20)]
    ended = 0
    for reader, _ in held[4:]:
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        ended += 1
    assert ended == 16
    for _, writer in held:
        writer.close()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_caller_that_hangs_up_cancels_nothing(serve: Any, how: str) -> None:
    served = await serve()
    served.gate.clear()
    caller = socket.create_connection(("127.0.0.1", served.port))
    caller.sendall(POST)
    await served.until(lambda: served.asked == 1)
    if how == "reset":
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    caller.close()
    await asyncio.sleep(0.05)
    assert served.finished == 0
    served.gate.set()
    await served.until(lambda: served.finished == 1)
    assert (await served.exchange(POST)).startswith(b"HTTP/1.1 200 ")


async def test_a_caller_that_takes_no_answer_is_dropped(serve: Any) -> None:
    """It asks and asks and never reads: once the kernel's buffers are full it holds nothing of ours for long."""
    served = await serve(read_s=0.3)
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.connect(("127.0.0.1", served.port))
    caller.setblocking(False)
    ask = b"GET /status HTTP/1.1\r\nHost: s\r\n\r\n" * 200
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(40):
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while True:
                await loop.sock_sendall(caller, ask)
    caller.close()


async def test_close_drops_who_waits(serve: Any) -> None:
    served = await serve()
    served.gate.clear()
    reader, writer = await served.connect()
    writer.write(POST)
    await served.until(lambda: served.asked == 1)
    async with asyncio.timeout(2):
        await served.sidecar.close()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await served.connect()
