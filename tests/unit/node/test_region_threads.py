"""A store that does not answer: what goes on in the background holds no thread that a start or a stop needs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.build import Build
from relume.errors import NotFound
from relume.node.background import Background
from relume.node.region.builds import Builds
from relume.node.region.copies import Copies
from relume.node.region.uploads import Uploads


class DeadStore:
    """Holds every caller until the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.held = 0

    def __call__(self, *_: object) -> Any:
        self.held += 1
        self.over.wait(30)
        raise NotFound("the test is over")


@pytest.fixture
async def store() -> AsyncIterator[DeadStore]:
    store = DeadStore()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    yield store
    store.over.set()


@pytest.mark.parametrize("work", ["builds", "uploads", "fills"])
async def test_a_start_finds_a_thread(store: DeadStore, work: str) -> None:
    background = Background()
    region = SimpleNamespace(find_build=store)
    view = cast("Any", SimpleNamespace(region=region, starts=SimpleNamespace(fill=store)))
    nobody = cast("Any", None)
    shelf = cast("Any", SimpleNamespace(load=store))
    uploads = Uploads(view, nobody, shelf, nobody, background.spawn)
    builds = Builds(view, nobody, background.spawn, print)
    copies = Copies(view, nobody, shelf, background.spawn, fault_wait_s=1.0)
    for number in range(3):
        match work:
            case "builds":
                layer = SimpleNamespace(path=Path("/nowhere"))  # so nobody tries again
                build = SimpleNamespace(build_id=f"b-{number}", app="a", inputs_digest="d", layers=[layer])
                builds.publish_later(cast("Build", build))
            case "uploads":
                uploads.begin(f"cp-{number}", None, cast("Any", SimpleNamespace(close=lambda: None)))
            case "fills":
                manifest = SimpleNamespace(name=SimpleNamespace(id="n"))
                fetched = SimpleNamespace(manifest=manifest, close=lambda: None)
                copies.finish(cast("Any", SimpleNamespace(fetched=fetched)))
    async with asyncio.timeout(5):
        while store.held < 3:  # noqa: ASYNC110 - threads count it
            await asyncio.sleep(0.01)
        await asyncio.to_thread(str)  # as relume.node.ground does its work
    store.over.set()
    await asyncio.wait(background._tasks)
