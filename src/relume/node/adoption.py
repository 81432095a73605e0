"""Across restarts of the node: instances that an earlier run of it left running, and what waits in them.

Guarantees: an instance does not notice; what asked for a checkpoint is answered, from the dump that its keeper
saw through meanwhile if there was one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from relume.build import Build
from relume.checkpoint.capture import Capturer
from relume.checkpoint.device import GpuShare
from relume.checkpoint.shelf import Intent, Shelf
from relume.engine.jobs import Container
from relume.errors import GpuLost, RelumeError, StartFailed
from relume.keeper.client import Keeper
from relume.linux import cgroup
from relume.node.background import Background
from relume.node.ending import Ending
from relume.node.failures import Failures
from relume.node.gpus import Gpus
from relume.node.hearing import Hearing
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.requests import Requests, subject
from relume.node.roster import Roster
from relume.node.settings import Settings

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Seconds for a keeper's first words to a restarted node; it has nothing else to do."""


class Adoption:
    """Takes over what an earlier run of this node left."""

    def __init__(
        self,
        places: Places,
        roster: Roster,
        shelf: Shelf,
        capturer: Capturer,
        gpus: Gpus,
        background: Background,
        *,
        hearing: Hearing,
        ending: Ending,
        requests: Requests,
        failures: Failures,
    ) -> None:
        self._places = places
        self._roster = roster
        self._shelf = shelf
        self._capturer = capturer
        self._gpus = gpus
        self._background = background
        self._hearing = hearing
        self._ending = ending
        self._requests = requests
        self._failures = failures

    async def adopt(self, row: dict[str, Any], build: Build) -> bool:
        """Take over the instance of a row of the node's state; whether it still runs."""
        facts = row["facts"]
        early: list[dict[str, Any]] = []
        keeper = Keeper(Container(**facts["container"]), early.append)
        try:
            async with asyncio.timeout(_PATIENCE):
                told = await keeper.connect(patience=0.5)
        except (RelumeError, TimeoutError) as error:
            log.info("%s was not there any more: %s", row["instance_id"], error)
            await keeper.close()
            return False
        share = GpuShare.from_dict(facts["gpu"]) if facts.get("gpu") else None
        half_made = share is not None and facts["restored"] and not facts["gpu_given"]
        if told["phase"] not in ("starting", "ready") or half_made:  # a prepared one is made anew
            await keeper.end()
            await keeper.close()
            return False
        instance = Instance(
            instance_id=row["instance_id"],
            build=build,
            settings=Settings.of(build),
            places=self._places.instance(row["instance_id"]),
            keeper=keeper,
            id_base=facts["id_base"],
            restored=facts["restored"],
            checkpoint_id=facts["checkpoint_id"],
            deferred=facts["deferred"],
            maker=facts["maker"],
            port=told["port"],
            started_at=row["started_at"],
            adopted=True,
            gpu=share,
            gpu_given=facts.get("gpu_given", False),
        )
        if share is not None:
            self._gpus.hold(instance.instance_id, share)
        if told["ready_at"] is not None:
            instance.state = "ready"
            instance.ready.set()
        self._roster.instances[instance.instance_id] = instance
        instance.asked.update(told["requests"])
        self._hearing.listen(instance)
        for event in early:  # between its first word and our listening
            self._hearing.heard(instance, event)
        self._background.spawn(self._see_through(instance, told))
        return True

    async def _see_through(self, instance: Instance, told: dict[str, Any]) -> None:
        """Bring to an end what an earlier run of this node began with the instance, and nobody else will."""
        checkpointed = await self._catch_up(instance, told)
        try:
            await instance.until_ready(instance.settings.boot_timeout)
        except StartFailed as error:
            log.warning("%s", error.message)
            await self._ending.discard(instance, "failed")
            return
        if instance.settings.trigger == "ready" and not instance.restored and not checkpointed:
            await self._requests.at_ready(instance)
        if instance.maker:
            await self._failures.made(instance)
            await self._ending.stop(instance)

    async def _catch_up(self, instance: Instance, told: dict[str, Any]) -> bool:
        """Answer what waits: a dump that was going on first. Returns whether the instance has its checkpoint."""
        dump = told["dump"]
        resumed = await self._resume(instance)
        answer = resumed or (dump and self._capturer.unsaid(subject(instance), dump["dump_id"]))
        # Who asks while a dump goes on is told so; of those who wait, only one that asked before it is its cause.
        causes = dump["requests"] if dump else told["requests"]
        for request in told["requests"]:
            if answer and request in causes:
                await instance.keeper.answer(request, 200, answer)
                causes = []
            else:
                await self._requests.answer(instance, request)
        if resumed and instance.settings.trigger == "ready":
            await self._requests.note(instance, resumed)
        return bool(answer)

    async def _resume(self, instance: Instance) -> dict[str, Any] | None:
        """The answer of a checkpoint that an earlier run of this node began."""
        unfinished = [one for one in self._shelf.unfinished() if one.instance_id == instance.instance_id]
        if instance.gpu is not None:
            await self._give_back(instance, unfinished)
        for intent in unfinished:
            return await self._capturer.resume(subject(instance), intent)
        return None

    async def _give_back(self, instance: Instance, unfinished: list[Intent]) -> None:
        """An earlier run of this node may have ended with the device memory put away: undo it after the dump."""
        try:
            for intent in unfinished:
                await instance.keeper.dumped(intent.dump_id)
            await self._gpus.memory.recover(cgroup.processes(instance.places.cgroup))
        except GpuLost as error:
            self._background.spawn(self._requests.lost(instance, error))
        except RelumeError as error:
            log.error("the GPU of %s cannot be looked at: %s", instance.instance_id, error.message)
