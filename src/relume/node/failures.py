"""What becomes of a checkpoint that could not be restored, and who takes the place of what it took down.

Nobody waits for a new checkpoint after a failed restore: a replacement is made from an extra instance in the
background, at most twice for a build.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Protocol

from relume.build import Build
from relume.checkpoint.capture import Capturer
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.errors import (
    SHORTAGES,
    BuildError,
    GpuUnavailable,
    HostError,
    ImageError,
    NotFound,
    RelumeError,
    StartFailed,
    StoreError,
    Untrusted,
)
from relume.keeper.client import KeeperLost
from relume.node.background import Background
from relume.node.bringup import BringUp
from relume.node.ending import Ending
from relume.node.instance import Instance
from relume.node.requests import Boot, subject
from relume.node.start import Start, Started, Starts
from relume.node.state import State

if TYPE_CHECKING:
    from relume.node.region import Copy, NodeRegion

log = logging.getLogger(__name__)

_REMAKES = 2


class Bring(Protocol):
    """Brings up an instance as anybody's start would."""

    def __call__(self, start: Start, *, restore_wanted: bool) -> Awaitable[Started]:
        """Raises StartFailed."""


class Failures:
    """Counts them against checkpoints, and mends what can be mended."""

    def __init__(
        self,
        shelf: Shelf,
        state: State,
        capturer: Capturer,
        bringup: BringUp,
        ending: Ending,
        background: Background,
        region: NodeRegion | None,
        starts: Starts,
        *,
        start: Bring,
        boot: Boot,
    ) -> None:
        self._shelf = shelf
        self._state = state
        self._capturer = capturer
        self._bringup = bringup
        self._ending = ending
        self._background = background
        self._region = region
        self._starts = starts
        self._start = start
        self._boot = boot

    async def restore_failed(
        self, checkpoint: Checkpoint, build: Build, error: Exception, copy: Copy | None
    ) -> str:
        """Count it against the checkpoint, if that may be at fault; returns what ``start`` says."""
        if copy is not None:
            why = await self._count_of_copy(copy, build, error)
        else:
            why = self._count(checkpoint.checkpoint_id, build, error)
        perhaps = _missed(checkpoint) if isinstance(error, StartFailed) else ""
        return f"restore failed: {why}{perhaps}"

    async def replace(self, instance: Instance) -> None:
        """A new instance in the place of one whose memory failed it.

        None for one that is being stopped; a stop that comes later calls the new one off, from the first moment.
        What took another's place, and fails too, is followed by a cold boot: nothing restores for ever.
        """
        with self._starts.begun(instance.build, instance.environment) as start:
            # It takes a while, and goes on when this is called off.
            counting = self._background.spawn(self._count_paging(instance))
            await start.unless_called_off(instance.ended.wait())
            if instance.state == "stopping":
                return
            await start.unless_called_off(asyncio.shield(counting))
            started = await self._start(start, restore_wanted=not instance.replacement)
            started.instance.replacement = True
            log.warning("%s takes the place of %s", started.instance.instance_id, instance.instance_id)

    async def made(self, instance: Instance) -> None:
        """Wait until an extra instance has had its checkpoint, or for as long as a boot may take."""
        deadline = time.monotonic() + instance.settings.boot_timeout
        offers = subject(instance).offers
        while self._capturer.usable(instance.build.build_id, offers) is None and time.monotonic() < deadline:
            if instance.ended.is_set():
                return
            await asyncio.sleep(0.2)

    async def _count_of_copy(self, copy: Copy, build: Build, error: Exception) -> str:
        """As _count, for one that came from the region, which is at its end with it."""
        assert self._region is not None
        if _blameless(error):
            self._region.copies.finish(copy)
            return _words(error)
        if not isinstance(error, RelumeError | OSError):
            log.error("restore from the region", exc_info=error)
        if await asyncio.to_thread(self._region.copies.failed, copy, error):
            self._background.spawn(self._remake(build))
        return _words(error)

    def _count(self, checkpoint_id: str, build: Build, error: Exception) -> str:
        """Count it against the checkpoint, replace that in the background if it was the last; returns why."""
        if _blameless(error):
            log.warning("restore of %s failed, and not for its own fault: %s", checkpoint_id, _words(error))
            return _words(error)
        if not isinstance(error, RelumeError | OSError):
            log.error("restore of %s", checkpoint_id, exc_info=error)
        damaged = isinstance(error, Untrusted | ImageError)
        health = self._shelf.restore_failed(checkpoint_id, _words(error), damaged=damaged)
        log.warning("restore of %s failed (%d): %s", checkpoint_id, health.failures, _words(error))
        if health.quarantined:
            self._background.spawn(self._remake(build))
        return _words(error)

    async def _count_paging(self, instance: Instance) -> None:
        """Of one that its pager ended. What it has of the region goes with it."""
        copy, instance.copy = instance.copy, None
        if copy is not None:
            kind = Untrusted if instance.wrong_bytes else StoreError
            await self._count_of_copy(copy, instance.build, kind(instance.paging_failed))
            return
        assert instance.checkpoint_id is not None
        try:
            checkpoint = self._shelf.load(instance.checkpoint_id)
        except NotFound:
            return  # removed meanwhile: there is nothing to count against
        error = await self._bringup.why_paging_failed(instance, checkpoint)
        self._count(checkpoint.checkpoint_id, instance.build, error)

    async def _remake(self, build: Build) -> None:
        """Make a new checkpoint from an instance nobody waits for."""
        instance = None
        try:
            if self._state.count_remake(build.build_id) > _REMAKES:
                log.warning("no third try to make a checkpoint of build %s", build.build_id)
                return
            with self._starts.begun(build) as start:
                instance = await self._boot(start, maker=True)
            await self.made(instance)
        except RelumeError as error:
            log.warning("no new checkpoint of %s: %s", build.app, error.message)
        finally:
            if instance is not None:
                await self._ending.stop(instance)


def _blameless(error: Exception) -> bool:
    """Whether it was the machine that failed a restore, and says nothing about the checkpoint: a keeper that did not
    come up or was killed, a layer that is not there, a GPU that another has or whose helper died, no room."""
    if isinstance(error, OSError):
        return error.errno in SHORTAGES
    return isinstance(error, HostError | KeeperLost | BuildError | GpuUnavailable)


def _missed(checkpoint: Checkpoint) -> str:
    """What a copy that came up and was not well may have missed."""
    left = checkpoint.left_behind
    if not (count := left.get("count", 0) - left.get("cache_count", 0)):
        return ""
    names = ", ".join(left["names"][: min(count, 3)]) + ", ..." * (count > 3)
    return (
        f"; written before the checkpoint and not in its copies: {names} "
        f'({count} in all): [relume.checkpoint] filesystem = "all" brings them along'
    )


def _words(error: Exception) -> str:
    return error.message if isinstance(error, RelumeError) else f"{type(error).__name__}: {error}"
