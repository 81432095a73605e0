"""Across restarts of the node: instances that an earlier run of it left running, and what waits in them.

Guarantees: an instance does not notice; what asked for a checkpoint is answered, from the dump that its keeper
saw through meanwhile if there was one. A keeper that does not answer yet is waited for as long as it is there.
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
from relume.keeper.instance import read_exit_code
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
"""Seconds for a keeper's first words to a restarted node, before it goes on with other things."""

_PAUSE = 1.0


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
        self._exit_codes: dict[str, int] = {}
        self._lacking: list[Instance] = []

    async def adopt(self, row: dict[str, Any], build: Build) -> bool:
        """Take over the instance of a row of the node's state; whether it still runs, or may."""
        early: list[dict[str, Any]] = []
        instance = self._instance(row, build, Keeper(Container(**row["facts"]["container"]), early.append))
        answering = asyncio.create_task(_first_words(instance.keeper))
        await asyncio.wait([answering], timeout=_PATIENCE)
        if not answering.done():
            log.warning("the keeper of %s does not answer yet", instance.instance_id)
            self._hold(instance)
            self._background.spawn(self._when_it_answers(instance, answering, early))
            return True
        try:
            told = answering.result()
        except RelumeError as error:
            log.info("%s was not there any more: %s", instance.instance_id, error)
            await instance.keeper.close()
            return False
        if not _adoptable(instance, told):
            self._note_exit_code(instance, told)
            await instance.keeper.end()
            await instance.keeper.close()
            paging = told.get("paging")
            if row["state"] == "ready" and paging is not None and paging["event"] == "failed":
                instance.paging_failed = paging["reason"]
                instance.wrong_bytes = bool(paging.get("untrusted"))
                instance.environment = told.get("given", {})
                instance.ended.set()
                self._lacking.append(instance)
            return False
        self._hold(instance)
        self._take_over(instance, told, early)
        return True

    def replace_failed(self) -> None:
        """What takes the place of those whose memory failed them while no node ran."""
        for instance in self._lacking:
            log.error("paging of %s failed: %s", instance.instance_id, instance.paging_failed)
            self._background.spawn(self._failures.replace(instance))
        self._lacking.clear()

    def _note_exit_code(self, instance: Instance, told: dict[str, Any]) -> None:
        if told.get("exit_code") is not None:
            self._exit_codes[instance.instance_id] = told["exit_code"]

    def exit_code(self, instance_id: str) -> int | None:
        """How one ended that is not taken over: what its keeper tells, or else has written down."""
        told = self._exit_codes.pop(instance_id, None)
        return told if told is not None else read_exit_code(self._places.instance(instance_id).exit_file)

    def _instance(self, row: dict[str, Any], build: Build, keeper: Keeper) -> Instance:
        """As the earlier run of this node wrote it down."""
        facts = row["facts"]
        return Instance(
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
            port=facts["port"],
            started_at=row["started_at"],
            adopted=True,
            gpu=GpuShare.from_dict(facts["gpu"]) if facts.get("gpu") else None,
            gpu_given=facts.get("gpu_given", False),
            state="starting" if row["state"] == "stopping" else row["state"],
        )

    def _hold(self, instance: Instance) -> None:
        """It is one of this node's instances."""
        self._roster.instances[instance.instance_id] = instance
        if instance.gpu is not None:
            self._gpus.hold(instance.instance_id, instance.gpu)

    async def _when_it_answers(
        self, instance: Instance, answering: asyncio.Task[dict[str, Any]], early: list[dict[str, Any]]
    ) -> None:
        """A keeper that was stopped, or starved, is none that is gone, and its app runs."""
        try:
            told = await answering
        except RelumeError as error:
            log.info("%s is not there any more: %s", instance.instance_id, error)
            told = None
        if instance.discarding or instance.state == "stopping":
            return
        if told is not None and _adoptable(instance, told):
            log.info("the keeper of %s answers", instance.instance_id)
            self._take_over(instance, told, early)
        elif instance.state == "prepared":
            await self._ending.forget(instance)
        else:
            self._note_exit_code(instance, told or {})
            instance.exit_code = self.exit_code(instance.instance_id)
            ended = instance.exit_code is not None and instance.state == "ready"
            await self._ending.discard(instance, "exited" if ended else "failed")

    def _take_over(self, instance: Instance, told: dict[str, Any], early: list[dict[str, Any]]) -> None:
        instance.port = told["port"]
        instance.environment = told.get("given", {})
        instance.state = "starting"
        if told["ready_at"] is not None:
            instance.state = "ready"
            instance.ready.set()
        # It may have become ready, or be prepared no more, since its row was written.
        self._roster.save(instance)
        instance.asked.update(told["requests"])
        self._hearing.listen(instance)
        if told.get("paging") is not None:  # the last of it, which nobody may have heard
            early.insert(0, {"event": "pager", "told": told["paging"]})
        for event in early:  # between its first word and our listening
            self._hearing.heard(instance, event)
        self._background.spawn(self._see_through(instance, told))

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


async def _first_words(keeper: Keeper) -> dict[str, Any]:
    """What ``hello`` tells, however long that takes. Raises EngineError, KeeperLost when it is gone."""
    while True:
        try:
            return await keeper.connect(patience=0.5)
        except OSError as error:
            log.warning("the keeper of %s: %s", keeper.container.instance_id, error)
            await asyncio.sleep(_PAUSE)


def _adoptable(instance: Instance, told: dict[str, Any]) -> bool:
    """Whether it runs and is whole. A prepared one, or one that is to be, is made anew."""
    half_made = instance.gpu is not None and instance.restored and not instance.gpu_given
    return told["phase"] in ("starting", "ready") and not half_made and not told.get("stopped", False)
