"""Work beside everything else: kept, its end reported, cancelled at the end."""

from __future__ import annotations

import asyncio
import gc

import pytest

from relume.errors import NotFound
from relume.node.background import Background


async def test_it_is_kept_and_cancelled() -> None:
    background = Background()
    done: list[str] = []

    async def work(name: str, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
            done.append(name)
        except asyncio.CancelledError:
            done.append(f"{name} cancelled")
            raise

    background.spawn(work("short", 0.01))
    background.spawn(work("long", 60))
    gc.collect()
    await asyncio.sleep(0.1)
    await background.close()
    assert done == ["short", "long cancelled"]


async def test_what_it_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    background = Background()

    async def fail(error: Exception) -> None:
        raise error

    tasks = [background.spawn(fail(error)) for error in (ValueError("a bug"), NotFound("said already"))]
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["a bug"]
