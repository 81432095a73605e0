"""One instance as the node sees it: who it is, how it is, and what its keeper tells."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from relume.build import Build
from relume.checkpoint.device import GpuShare
from relume.errors import StartFailed
from relume.keeper.client import Keeper
from relume.linux import cgroup
from relume.node.gpus import Grant
from relume.node.places import InstancePlaces
from relume.node.settings import Settings

if TYPE_CHECKING:
    from relume.node.region import Copy
    from relume.node.start import Start
    from relume.store import Pin

InstanceState = Literal["starting", "ready", "stopping", "exited", "failed", "prepared"]

_LAST_WORDS = 4096
SLOWEST_DISK = 50e6
"""Bytes per second."""


@dataclasses.dataclass(slots=True)
class Instance:
    """A living instance. ``deferred``: booted because a restore failed, so it makes no checkpoint."""

    instance_id: str
    build: Build
    settings: Settings
    places: InstancePlaces
    keeper: Keeper
    id_base: int
    restored: bool
    checkpoint_id: str | None
    deferred: bool = False
    maker: bool = False
    """Started by the node only to make a checkpoint."""
    adopted: bool = False
    """Taken over from an earlier run of the node."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What its caller gave it, for whoever takes its place; kept in memory only (its keeper's too), for it may be
    secret."""
    replacement: bool = False
    """It took the place of one whose memory failed it."""
    memory: str = "fresh"
    """How its memory came: "fresh", "paged", or "eager: " and why."""
    paging_failed: str = ""
    wrong_bytes: bool = False
    """What failed were bytes that are not what they must be."""
    copy: Copy | None = None
    """The region's checkpoint that it came from, until it can do without."""
    pin: Pin | None = None
    """Keeps the region's cache from evicting what it still pages from."""
    answered: bool = False
    """Its first answer left; known of restored ones."""
    from_store: dict[str, int] = dataclasses.field(default_factory=dict)
    """``store_bytes`` and ``store_requests`` up to its first answer, for one that came from the region's store."""
    gpu: GpuShare | None = None
    """The GPUs it has, if any."""
    grant: Grant | None = None
    """What bringing it up with them takes; None once adopted."""
    gpu_given: bool = False
    """A copy's device memory is back: before that it is not ready, whatever it answers."""
    state: InstanceState = "starting"
    port: int = 0
    started_at: float = dataclasses.field(default_factory=time.time)
    exit_code: int | None = None
    ready: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """Set when its container is over; ``exit_code`` is known by then, unless its keeper died."""
    gone: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """Set when nothing of it is left but its log."""
    start: Start | None = None
    """The start that brings it up, and clears up should that fail; None once it is ready, or was adopted."""
    discarding: bool = False
    asked: set[int] = dataclasses.field(default_factory=set)
    """The requests of the app that are being answered or were."""
    timeline: dict[str, float] = dataclasses.field(default_factory=dict)
    whole: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    """Set when the processes that a GPU's driver is to work on lack no memory any more."""

    def unpin(self) -> None:
        if self.pin is not None:
            self.pin.close()
            self.pin = None

    @property
    def url(self) -> str | None:
        """Where its port is published; None before it is."""
        return f"http://127.0.0.1:{self.port}" if self.port else None

    def facts(self) -> dict[str, Any]:
        """What a restarted node needs to adopt it; no secrets."""
        return {
            "id_base": self.id_base,
            "restored": self.restored,
            "checkpoint_id": self.checkpoint_id,
            "deferred": self.deferred,
            "maker": self.maker,
            "port": self.port,
            "gpu": self.gpu.as_dict() if self.gpu else None,
            "gpu_given": self.gpu_given,
            "container": dataclasses.asdict(self.keeper.container),
        }

    def listing(self) -> dict[str, Any]:
        """Its row in ``ps``."""
        return {
            "instance_id": self.instance_id,
            "app": self.build.app,
            "build_id": self.build.build_id,
            "state": self.state,
            "restored": self.restored,
            "checkpoint_id": self.checkpoint_id,
            "url": self.url,
            "memory_bytes": cgroup.memory(self.places.cgroup)[0],
            "started_at": self.started_at,
            "exit_code": self.exit_code,
            **self.from_store,
        }

    def last_words(self) -> str:
        """The end of its log."""
        try:
            with self.places.log.open("rb") as file:
                file.seek(max(0, self.places.log.stat().st_size - _LAST_WORDS))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    async def until_whole(self, size: int) -> None:
        """Return when ``whole`` is set, for ``size`` bytes of memory. Raises StartFailed when it ends first or takes
        longer than the slowest disk would."""
        patience = 60 + size / SLOWEST_DISK
        await self._any_of(self.whole, patience)
        if not self.whole.is_set():
            raise StartFailed(
                f"the memory of {self.build.app} was not there within {patience:.0f} s, as its GPU's driver needs it",
                hint="a slow disk, or no memory to spare: the instance's keeper.log has the pager's words",
                log=self.last_words(),
            )

    async def _any_of(self, event: asyncio.Event, patience: float) -> None:
        """Wait for ``event``, its end, its keeper's loss, or ``patience`` seconds."""
        waits = [asyncio.ensure_future(each.wait()) for each in (event, self.ended, self.keeper.lost)]
        try:
            await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def until_ready(self, patience: float) -> None:
        """Return when it is ready. Raises StartFailed when it ends first or takes over ``patience`` seconds."""
        await self._any_of(self.ready, patience)
        if self.ready.is_set():
            return
        words = self.last_words()
        if self.ended.is_set():
            raise StartFailed(
                f"{self.build.app} ended with status {self.exit_code} before it was ready",
                hint=f"its log: relume logs {self.instance_id}",
                exit_code=self.exit_code,
                log=words,
            )
        check = f"GET {self.settings.readycheck}" if self.settings.readycheck else "a connection"
        raise StartFailed(
            f"{self.build.app} did not answer {check} on port {self.build.port} within {patience:.0f} s",
            hint=f"its log: relume logs {self.instance_id}; "
            "[cerebrium.deployment] deployment_initialization_timeout gives it longer",
            log=words,
        )
