"""Checkpoints that instances ask for, and those that the node makes by itself when one is ready."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable
from typing import Any, Protocol

from relume.checkpoint.capture import Capturer, Subject
from relume.errors import GpuLost
from relume.node.background import Background
from relume.node.ending import Ending
from relume.node.instance import Instance
from relume.node.start import Start, Starts

log = logging.getLogger(__name__)


class Boot(Protocol):
    """Boots an instance that nobody waits for. Raises what a start raises."""

    def __call__(self, start: Start, *, deferred: bool = ..., maker: bool = ...) -> Awaitable[Instance]: ...


class Requests:
    """Answers them, whatever comes of it."""

    def __init__(
        self, capturer: Capturer, ending: Ending, background: Background, starts: Starts, *, boot: Boot
    ) -> None:
        self._capturer = capturer
        self._ending = ending
        self._background = background
        self._starts = starts
        self._boot = boot

    async def answer(self, instance: Instance, request: int) -> None:
        """Make the checkpoint that the instance asked for, and answer it."""
        body = await self._checkpoint(instance)
        if not instance.keeper.lost.is_set():
            await instance.keeper.answer(request, 200, body)

    async def at_ready(self, instance: Instance) -> None:
        """``[relume.checkpoint] trigger = "ready"``: make one unasked; the log gets the answer."""
        await self.note(instance, await self._checkpoint(instance))

    async def note(self, instance: Instance, answer: dict[str, Any]) -> None:
        """Say in the instance's log what came of a checkpoint that it did not ask for."""
        if not instance.keeper.lost.is_set():
            await instance.keeper.note(f"relume: checkpoint at ready: {json.dumps(answer)}")

    async def lost(self, instance: Instance, error: GpuLost) -> None:
        """The driver cannot bring it back: end it, and put another in its place, which does not try again.

        None for one that is being stopped; a stop that comes later calls the other off, from the first moment.
        """
        log.error("%s has lost its GPU: %s", instance.instance_id, error.message)
        with self._starts.begun(instance.build, instance.environment) as start:
            wanted = not instance.maker and instance.state != "stopping"
            await self._ending.discard(instance, "failed")
            if wanted:
                other = await self._boot(start, deferred=True)
                log.warning("%s takes the place of %s", other.instance_id, instance.instance_id)

    async def _checkpoint(self, instance: Instance) -> dict[str, Any]:
        try:
            return await self._capturer.request(subject(instance))
        except GpuLost as error:
            self._background.spawn(self.lost(instance, error))
            return {"status": "failed", "reason": "gpu", "checkpoint_id": None, "message": error.message}
        except Exception as error:
            log.exception("checkpoint of %s", instance.instance_id)
            return {"status": "failed", "reason": "engine", "checkpoint_id": None, "message": str(error)}


def subject(instance: Instance) -> Subject:
    """The instance as the capture story needs it."""
    settings = instance.settings
    return Subject(
        instance_id=instance.instance_id,
        app=instance.build.app,
        build_id=instance.build.build_id,
        keeper=instance.keeper,
        upper=instance.places.upper,
        rootfs=instance.places.rootfs,
        cgroup=instance.places.cgroup,
        id_base=instance.id_base,
        checkpointing=instance.build.checkpointing,
        restored=instance.restored,
        deferred=instance.deferred,
        loopback=settings.loopback,
        filesystem=settings.filesystem,
        held_limit=settings.held_limit,
        memory_limit=settings.limits.memory,
        gpu=instance.gpu,
    )
