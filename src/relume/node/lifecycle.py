"""How instances come. ``start`` is the story to read:

    is there a usable checkpoint, here or else in the region?
        yes -> restore it; if that fails, say why, take everything away and
        no  -> boot, cold

Guarantees: a failed restore costs the caller time, never the start; an instance that is returned is ready.

A start that is under way owns its instance, and clears it up if it fails; from its readiness on the instance
ends as relume.node.ending says. Beside this story: what failed restores come to (relume.node.failures), what
keepers tell (hearing), what apps ask (requests), what an earlier run of the node left (adoption).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from relume.build import Build
from relume.checkpoint.capture import Capturer
from relume.checkpoint.platform import NO_GPU, Offers
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.errors import BuildError, RelumeError, StartFailed
from relume.node.adoption import Adoption
from relume.node.background import Background
from relume.node.bringup import BringUp
from relume.node.ending import Ending
from relume.node.failures import Failures
from relume.node.gpus import Gpus
from relume.node.ground import Ground
from relume.node.hearing import Hearing
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.prepared import Prepared
from relume.node.requests import Requests
from relume.node.roster import Roster
from relume.node.settings import Settings
from relume.node.spares import Spares
from relume.node.start import Start, Started, Starts
from relume.node.state import State

if TYPE_CHECKING:
    from relume.node.region import Copy, NodeRegion

log = logging.getLogger(__name__)


class Lifecycle:
    """All living instances of one node."""

    def __init__(
        self,
        places: Places,
        state: State,
        shelf: Shelf,
        capturer: Capturer,
        ground: Ground,
        spares: Spares,
        background: Background,
        region: NodeRegion | None,
        *,
        bringup: BringUp,
        gpus: Gpus,
        build_of: Callable[[str], Build],
    ) -> None:
        self._places = places
        self._state = state
        self._capturer = capturer
        self._spares = spares
        self._background = background
        self._region = region
        self._bringup = bringup
        self._gpus = gpus
        self._build_of = build_of
        self.starts = Starts()
        self.roster = Roster(places, state)
        self.ending = Ending(self.roster, ground, gpus, finish_copy=self._finish_copy)
        self._requests = Requests(capturer, self.ending, background, self.starts, boot=self._boot)
        self._failures = Failures(
            shelf,
            state,
            capturer,
            bringup,
            self.ending,
            background,
            region,
            self.starts,
            start=self._start,
            boot=self._boot,
        )
        self._hearing = Hearing(
            self.roster,
            self.ending,
            self._requests,
            self._failures,
            background,
            region,
            finish_copy=self._finish_copy,
        )
        self.adoption = Adoption(
            places,
            self.roster,
            shelf,
            capturer,
            gpus,
            background,
            hearing=self._hearing,
            ending=self.ending,
            requests=self._requests,
            failures=self._failures,
        )
        self.prepared = Prepared(
            current=self._to_prepare,
            prepare=self.prepare,
            discard=self.ending.forget,
        )

    @property
    def instances(self) -> Mapping[str, Instance]:
        """Those that live, by id."""
        return self.roster.instances

    # --- start ------------------------------------------------------------------------------------

    async def start(
        self,
        build: Build,
        *,
        restore_wanted: bool = True,
        environment: Mapping[str, str] | None = None,
        memory: str = "paged",
    ) -> Started:
        """A ready instance of ``build``. Raises StartFailed when even the cold boot fails.

        ``memory`` is how a copy's memory comes: "paged" (replaying and learning), "unlearned" (paged, without
        either), "eager", or "criu" (paged by CRIU's own daemon); all but the first are for comparison.
        """
        with self.starts.begun(build, environment) as start:
            return await self._start(start, restore_wanted=restore_wanted, memory=memory)

    async def _start(self, start: Start, *, restore_wanted: bool, memory: str = "paged") -> Started:
        """What :meth:`start` does, for a start that goes on already."""
        build, trace = start.build, start.trace
        offers = await self.offers(build)
        reason, checkpoint = self.choose(build, restore_wanted=restore_wanted, offers=offers)
        if checkpoint is not None and self._region is not None:
            gone = await self._region.copies.gone(checkpoint.checkpoint_id)
            reason, checkpoint = gone, None if gone else checkpoint
        trace.mark("lookup")
        self.prepared.want(build.app)
        if checkpoint is not None and memory == "paged":
            taken = await self._take_prepared(start, checkpoint)
            if taken is not None:
                return Started(taken, None, trace.elapsed, trace.stages, "prepared")
        copy = None
        wanted = restore_wanted and build.checkpointing and offers == NO_GPU
        if checkpoint is None and self._region is not None and wanted:
            why_not, copy = await self._region.copies.find(build)
            reason = why_not or reason
            checkpoint = copy.checkpoint if copy is not None else None
            trace.mark("fetched")
        if checkpoint is not None:
            try:
                instance = await self._restore(start, checkpoint, memory, copy)
                stages = trace.stages | instance.from_store
                return Started(instance, None, trace.elapsed, stages, instance.memory)
            except Exception as error:  # whatever it is, the start must not fail for it
                if start.called_off.is_set() and self._region is not None and copy is not None:
                    self._region.copies.finish(copy)
                start.proceed()
                reason = await self._failures.restore_failed(checkpoint, build, error, copy)
                trace.mark("restore_failed")
        instance = await self._boot(start, deferred=checkpoint is not None)
        return Started(instance, reason, trace.elapsed, trace.stages)

    async def offers(self, build: Build) -> Offers:
        """The GPUs that a start of ``build`` could get now."""
        settings = Settings.of(build)
        return await self._gpus.offers(settings.compute, settings.gpus)

    def choose(
        self, build: Build, *, restore_wanted: bool, offers: Offers = NO_GPU
    ) -> tuple[str | None, Checkpoint | None]:
        """The checkpoint to start from, or the reason why none is."""
        if not build.checkpointing:
            return "checkpointing is off for this build", None
        if not restore_wanted:
            return "a cold start was asked for", None
        checkpoint = self._capturer.usable(build.build_id, offers)
        if checkpoint is not None:
            return None, checkpoint
        return self._capturer.why_not(build.build_id, offers), None

    async def _boot(self, start: Start, *, deferred: bool = False, maker: bool = False) -> Instance:
        """Cold (relume.node.requests.Boot)."""
        build = start.build
        instance = self._new(start, None, deferred=deferred, maker=maker)
        try:
            await self._spares.bring_up(instance.keeper)
            await self._give_gpus(instance)
            start.proceed()
            await self._bringup.boot(instance, start)
        except Exception as error:
            await self._clear_up(instance, start)
            if isinstance(error, StartFailed) or not isinstance(error, RelumeError | OSError):
                raise
            message = error.message if isinstance(error, RelumeError) else str(error)
            raise StartFailed(
                f"{build.app} could not be started: {message}",
                hint=getattr(error, "hint", "")
                or f"relume doctor; its log: relume logs {instance.instance_id}",
                log=instance.last_words(),
            ) from error
        self._now_ready(instance, start)
        return instance

    async def _take_prepared(self, start: Start, checkpoint: Checkpoint) -> Instance | None:
        """A prepared instance, let run; None where there is none, or where the one there was did not run."""
        instance = self.prepared.take(start.build, checkpoint)
        if instance is None:
            return None
        instance.start = start
        instance.environment = start.environment
        instance.state = "starting"
        instance.started_at = time.time()
        self.roster.save(instance)  # from here on it is more than a prepared one, of which nothing is kept
        try:
            await self._bringup.resume(instance, checkpoint, start)
        except Exception as error:
            await self._clear_up(instance, start)
            start.proceed()
            log.warning("a prepared instance of %s did not run: %s", start.build.app, error)
            return None
        self._now_ready(instance, start)
        return instance

    async def prepare(self, build: Build, checkpoint: Checkpoint) -> Instance:
        """An instance restored and stopped. Raises what a restore raises; nothing of it is left then."""
        with self.starts.begun(build) as start:
            instance = self._new(start, checkpoint.checkpoint_id)
            try:
                await self._spares.bring_up(instance.keeper)
                start.proceed()
                await self._bringup.prepare(instance, checkpoint, start)
            except Exception:
                await self._clear_up(instance, start)
                raise
            instance.state = "prepared"
            self._brought_up(instance)
            self.roster.save(instance)
            return instance

    async def _restore(
        self, start: Start, checkpoint: Checkpoint, memory: str, copy: Copy | None = None
    ) -> Instance:
        instance = self._new(start, checkpoint.checkpoint_id)
        if copy is None and self._region is not None:
            instance.pin = self._region.copies.pin(checkpoint.checkpoint_id)
        if copy is not None:
            instance.from_store = {"store_bytes": copy.store_bytes, "store_requests": copy.store_requests}
            instance.copy = copy
        try:
            await self._spares.bring_up(instance.keeper)
            await self._give_gpus(instance, checkpoint)
            start.proceed()
            self._background.keep(await self._bringup.restore(instance, checkpoint, start, memory, copy))
        except Exception:
            instance.copy = None  # the start has it
            await self._clear_up(instance, start)
            raise
        if not instance.memory.startswith("paged"):
            self._finish_copy(instance)
        self._now_ready(instance, start)
        return instance

    def _new(
        self, start: Start, checkpoint_id: str | None, *, deferred: bool = False, maker: bool = False
    ) -> Instance:
        """An instance with a name that ``ps`` shows, and nothing behind it yet."""
        start.proceed()
        build = start.build
        app = self._state.app(build.app)
        for layer in build.layers:
            if not layer.path.is_dir():
                raise BuildError(
                    f"layer {layer.digest[:12]} of {build.app} is gone from {layer.path.parent}",
                    hint=f"relume deploy --fresh {app.directory} makes the build anew",
                )
        keeper = self._spares.take()
        instance_id = keeper.container.instance_id
        instance = Instance(
            instance_id=instance_id,
            build=build,
            settings=Settings.of(build),
            places=self._places.instance(instance_id),
            keeper=keeper,
            id_base=app.id_base,
            restored=checkpoint_id is not None,
            checkpoint_id=checkpoint_id,
            deferred=deferred,
            maker=maker,
            environment=start.environment,
            start=start,
        )
        self.roster.instances[instance_id] = instance
        self._hearing.listen(instance)
        self.roster.save(instance)
        return instance

    async def _clear_up(self, instance: Instance, start: Start) -> None:
        """A start has failed or was called off: nothing of it stays but its log."""
        if start.called_off.is_set():
            await self.ending.terminate(instance)
        await self.ending.discard(instance, "failed")

    async def _give_gpus(self, instance: Instance, checkpoint: Checkpoint | None = None) -> None:
        """The GPUs that it asks for, if it does. Raises GpuUnavailable."""
        settings = instance.settings
        if settings.gpus:
            record = checkpoint.gpu if checkpoint else None
            instance.grant = await self._gpus.give(
                instance.instance_id, settings.compute, settings.gpus, record
            )
            instance.gpu = instance.grant.share
            self.roster.save(instance)

    def _brought_up(self, instance: Instance) -> None:
        """From now on its end is not a start's matter."""
        instance.start = None
        if instance.ended.is_set():
            self._background.spawn(self.ending.over(instance))

    def _now_ready(self, instance: Instance, start: Start) -> None:
        start.trace.merge(instance.timeline)
        start.trace.mark("ready")
        self._brought_up(instance)
        if instance.gpu_given:
            self.roster.save(instance)
        if instance.settings.trigger == "ready" and not instance.restored:
            self._background.spawn(self._requests.at_ready(instance))

    def _to_prepare(self, app: str) -> tuple[Build, Checkpoint] | None:
        """The build and checkpoint that the next start of ``app`` would use, if it would restore."""
        try:
            build = self._build_of(app)
        except RelumeError:  # removed, or the state cannot be read now
            return None
        if not build.config["relume"]["checkpoint"]["prepared"] or Settings.of(build).gpus:
            return None  # one that is stopped cannot hold device memory: the driver needs it running
        _, checkpoint = self.choose(build, restore_wanted=True)
        return None if checkpoint is None else (build, checkpoint)

    def _finish_copy(self, instance: Instance) -> None:
        """The instance has what it needs of the region's checkpoint: the rest is the node's to bring."""
        instance.unpin()
        copy, instance.copy = instance.copy, None
        if copy is not None and self._region is not None:
            self._region.copies.finish(copy)

    async def close(self) -> None:
        """Drop the connections; the instances run on, and so do starts that have come to runc."""
        await self.starts.close()
        for instance in [one for one in self.instances.values() if one.discarding]:
            await instance.gone.wait()
        await self._background.close()
        for instance in self.instances.values():
            await instance.keeper.close()
