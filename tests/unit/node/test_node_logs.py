"""Following a log across rotations."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from relume.keeper.log import STDOUT, Log
from relume.node import logs


async def read(path: Path, ended: asyncio.Event | None = None) -> bytes:
    return b"".join([piece async for piece in logs.follow(path, ended=ended)])


async def test_what_is_there(tmp_path: Path) -> None:
    assert await read(tmp_path / "log") == b""
    log = Log(tmp_path / "log", limit=10)
    log.write(b"0123456789\n", STDOUT)
    assert await read(tmp_path / "log") == b"0123456789\n"
    log.write(b"\nnew\n", STDOUT)
    log.close()
    assert await read(tmp_path / "log") == b"0123456789\n\nnew\n"


async def test_it_ends_with_the_instance_and_not_before(tmp_path: Path) -> None:
    log = Log(tmp_path / "log", limit=1 << 20)
    log.write(b"one\n", STDOUT)
    ended = asyncio.Event()
    reading = asyncio.create_task(read(tmp_path / "log", ended))
    await asyncio.sleep(0.15)
    assert not reading.done()
    log.write(b"two\n", STDOUT)
    ended.set()
    async with asyncio.timeout(2):
        assert await reading == b"one\ntwo\n"
    log.close()


async def test_rotations_meanwhile_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that rotates again and again, never more than the reader is behind: one old file is all that is kept."""
    monkeypatch.setattr(logs, "_PAUSE", 0.0005)
    path = tmp_path / "log"
    log = Log(path, limit=4096)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    lines = [b"line %d\n" % number for number in range(40_000)]
    got = bytearray()

    def write() -> None:
        pause = threading.Event()
        written = 0
        for start in range(0, len(lines), 100):
            block = b"".join(lines[start : start + 100])
            log.write(block, STDOUT)
            written += len(block)
            while written - len(got) > 4096:
                pause.wait(0.0005)
        loop.call_soon_threadsafe(ended.set)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    async with asyncio.timeout(50):
        async for piece in logs.follow(path, ended=ended):
            got += piece
    writer.join()
    log.close()
    assert got == b"".join(lines)


async def test_a_rotation_between_the_last_read_and_the_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written after the end was seen, and before the rename, is read all the same."""
    path = tmp_path / "log"
    log = Log(path, limit=10)
    log.write(b"first line\n", STDOUT)
    ended = asyncio.Event()
    following = logs.follow(path, ended=ended)
    assert await anext(following) == b"first line\n"
    log.write(b"finishes\nsecond file\n", STDOUT)
    assert await anext(following) == b"finishes\n"
    assert await anext(following) == b"second file\n"
    log.write(b"a\nthird file\n", STDOUT)
    log.write(b"and a fourth\nfile\n", STDOUT)  # two at once: the generation in between is still there
    ended.set()
    assert [piece async for piece in following] == [b"a\n", b"third file\nand a fourth\n", b"file\n"]
    log.close()
