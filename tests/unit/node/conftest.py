"""Instances without a container: what counts is what the node does with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.build import Build
from relume.engine.jobs import Container
from relume.keeper.client import Keeper
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.settings import Settings

BUILD = cast("Build", SimpleNamespace(app="a", build_id="b", checkpointing=True, port=8000))
SETTINGS = cast("Settings", SimpleNamespace(boot_timeout=5.0, trigger="request", gpus=0))


class FakeKeeper:
    """Ends at once when it is told to."""

    def __init__(self, container: Container, on_event: Callable[[dict[str, Any]], None] = print) -> None:
        self.container = container
        self.on_event = on_event
        self.lost = asyncio.Event()

    async def ask(self, op: str) -> dict[str, Any]:
        return {"pid": 0}

    async def end(self) -> None:
        self.lost.set()

    async def close(self) -> None:
        pass


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path, "n")


@pytest.fixture
def instance(places: Places) -> Callable[..., Instance]:
    """Makes a ready copy; by name, what is to be different."""

    def make(instance_id: str = "i-1", **more: Any) -> Instance:
        container = Container(instance_id, "/r", "/runc", "/root", "/criu", f"/relume/n/{instance_id}", False)
        content: dict[str, Any] = {
            "build": BUILD,
            "settings": SETTINGS,
            "places": places.instance(instance_id),
            "keeper": cast("Keeper", FakeKeeper(container)),
            "id_base": 524288,
            "restored": True,
            "checkpoint_id": "cp-1",
            "state": "ready",
        }
        return Instance(instance_id=instance_id, **(content | more))

    return make
