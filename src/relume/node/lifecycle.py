"""How instances come and go. ``start`` is the story to read:

    is there a usable checkpoint, here or else in the region?
        yes -> restore it; if that fails, say why, take everything away and
        no  -> boot, cold

Guarantees: a failed restore costs the caller time, never the start; an instance that is returned is ready; one
that is gone has left its log and nothing else. Nobody waits for a new checkpoint after a failed restore: a
replacement is made from an extra instance in the background, at most twice for a build.

A start that is under way owns its instance, and clears it up if it fails; from its readiness on the instance
is ended by ``stop``, by its own exit, or by its keeper's death, whoever comes first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relume.build import Build
from relume.checkpoint.capture import Capturer, Subject
from relume.checkpoint.device import GpuShare
from relume.checkpoint.platform import NO_GPU, Offers
from relume.checkpoint.shelf import Checkpoint, Intent, Shelf
from relume.engine.jobs import Container
from relume.errors import (
    BuildError,
    EngineError,
    GpuLost,
    GpuUnavailable,
    ImageError,
    NotFound,
    RelumeError,
    StartFailed,
    StoreError,
    Untrusted,
)
from relume.keeper.client import Keeper
from relume.linux import cgroup, process
from relume.node.bringup import BringUp
from relume.node.gpus import Gpus
from relume.node.ground import Ground
from relume.node.instance import Instance, InstanceState
from relume.node.places import Places
from relume.node.prepared import Prepared
from relume.node.settings import Settings
from relume.node.spares import Spares
from relume.node.start import Start, Started
from relume.node.state import State

if TYPE_CHECKING:
    from relume.node.region import Copy, NodeRegion

log = logging.getLogger(__name__)

_RESTORE_PATIENCE = 60.0
"""Seconds for a copy to become ready; it was ready, or on its way, when it was saved."""

_STOP_PATIENCE = 10.0
"""Seconds between SIGTERM and SIGKILL for a process that handles SIGTERM."""

_ADOPT_PATIENCE = 5.0
"""Seconds for a keeper's first words to a restarted node; it has nothing else to do."""

_REMAKES = 2
_KEEP_ENDED = 10


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
        *,
        bringup: BringUp,
        gpus: Gpus,
        build_of: Callable[[str], Build],
    ) -> None:
        self._places = places
        self._state = state
        self._shelf = shelf
        self._capturer = capturer
        self._ground = ground
        self._spares = spares
        self.bringup = bringup
        self._gpus = gpus
        self._build_of = build_of
        self.prepared = Prepared(
            current=self._to_prepare,
            prepare=self.prepare,
            discard=self._forget,
        )
        self.region: NodeRegion | None = None
        self._copies: dict[str, Copy] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starts: set[Start] = set()
        self.instances: dict[str, Instance] = {}

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
        with self._started(Start(build, environment or {})) as start:
            trace = start.trace
            offers = await self.offers(build)
            reason, checkpoint = self.choose(build, restore_wanted=restore_wanted, offers=offers)
            trace.mark("lookup")
            self.prepared.want(build.app)
            if checkpoint is not None and memory == "paged":
                taken = await self._take_prepared(start, checkpoint)
                if taken is not None:
                    return Started(taken, None, trace.elapsed, trace.stages, "prepared")
            copy = None
            wanted = restore_wanted and build.checkpointing and offers == NO_GPU
            if checkpoint is None and self.region is not None and wanted:
                why_not, copy = await self.region.copies.find(build)
                reason = why_not or reason
                checkpoint = copy.checkpoint if copy is not None else None
                trace.mark("fetched")
            if checkpoint is not None:
                try:
                    instance = await self._restore(start, checkpoint, memory, copy)
                    stages = trace.stages | instance.from_store
                    return Started(instance, None, trace.elapsed, stages, instance.memory)
                except Exception as error:  # whatever it is, the start must not fail for it
                    if start.called_off.is_set() and self.region is not None and copy is not None:
                        self.region.copies.finish(copy)
                    start.proceed()
                    reason = await self._restore_failed(checkpoint, build, error, copy)
                    trace.mark("restore_failed")
            instance = await self._boot(start, deferred=checkpoint is not None)
            return Started(instance, reason, trace.elapsed, trace.stages)

    @contextmanager
    def _started(self, start: Start) -> Iterator[Start]:
        """Known, so that it can be called off, for as long as it lasts."""
        self._starts.add(start)
        try:
            yield start
        finally:
            self._starts.discard(start)
            start.over.set()

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

    async def _boot(self, start: Start, *, deferred: bool, maker: bool = False) -> Instance:
        build = start.build
        instance = self._new(start, None, deferred=deferred, maker=maker)
        try:
            await self._spares.bring_up(instance.keeper)
            await self._give_gpus(instance)
            start.proceed()
            await self.bringup.boot(instance, start)
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
        try:
            await self.bringup.resume(instance, checkpoint, start)
        except Exception as error:
            await self._clear_up(instance, start)
            start.proceed()
            log.warning("a prepared instance of %s did not run: %s", start.build.app, error)
            return None
        self._now_ready(instance, start)
        return instance

    async def prepare(self, build: Build, checkpoint: Checkpoint) -> Instance:
        """An instance restored and stopped. Raises what a restore raises; nothing of it is left then."""
        with self._started(Start(build, {})) as start:
            instance = self._new(start, checkpoint.checkpoint_id)
            try:
                await self._spares.bring_up(instance.keeper)
                start.proceed()
                await self.bringup.prepare(instance, checkpoint, start)
            except Exception:
                await self._clear_up(instance, start)
                raise
            instance.state = "prepared"
            self._brought_up(instance)
            self._save(instance)
            return instance

    async def _restore(
        self, start: Start, checkpoint: Checkpoint, memory: str, copy: Copy | None = None
    ) -> Instance:
        instance = self._new(start, checkpoint.checkpoint_id)
        if copy is not None:
            instance.from_store = {"store_bytes": copy.store_bytes, "store_requests": copy.store_requests}
            self._copies[instance.instance_id] = copy
        try:
            await self._spares.bring_up(instance.keeper)
            await self._give_gpus(instance, checkpoint)
            start.proceed()
            self._keep(await self.bringup.restore(instance, checkpoint, start, memory, copy))
        except Exception:
            self._copies.pop(instance.instance_id, None)
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
        self.instances[instance_id] = instance
        self._listen(instance)
        self._save(instance)
        return instance

    async def _clear_up(self, instance: Instance, start: Start) -> None:
        """A start has failed or was called off: nothing of it stays but its log."""
        if start.called_off.is_set():
            await self._terminate(instance)
        await self._discard(instance, "failed")

    async def _give_gpus(self, instance: Instance, checkpoint: Checkpoint | None = None) -> None:
        """The GPUs that it asks for, if it does. Raises GpuUnavailable."""
        settings = instance.settings
        if settings.gpus:
            record = checkpoint.gpu if checkpoint else None
            instance.grant = await self._gpus.give(
                instance.instance_id, settings.compute, settings.gpus, record
            )
            instance.gpu = instance.grant.share
            self._save(instance)

    def _brought_up(self, instance: Instance) -> None:
        """From now on its end is not a start's matter."""
        instance.start = None
        if instance.ended.is_set():
            self.spawn(self._over(instance))

    def _now_ready(self, instance: Instance, start: Start) -> None:
        start.trace.merge(instance.timeline)
        start.trace.mark("ready")
        self._brought_up(instance)
        if instance.gpu_given:
            self._save(instance)
        if instance.settings.trigger == "ready" and not instance.restored:
            self.spawn(self._checkpoint_at_ready(instance))

    def _to_prepare(self, app: str) -> tuple[Build, Checkpoint] | None:
        """The build and checkpoint that the next start of ``app`` would use, if it would restore."""
        try:
            build = self._build_of(app)
        except NotFound:
            return None
        if not build.config["relume"]["checkpoint"]["prepared"] or Settings.of(build).gpus:
            return None  # one that is stopped cannot hold device memory: the driver needs it running
        _, checkpoint = self.choose(build, restore_wanted=True)
        return None if checkpoint is None else (build, checkpoint)

    # --- after a failed restore -------------------------------------------------------------------

    async def _restore_failed(
        self, checkpoint: Checkpoint, build: Build, error: Exception, copy: Copy | None
    ) -> str:
        if copy is not None:
            return f"restore failed: {await self._copy_failed(copy, build, error)}"
        return f"restore failed: {self._count_failure(checkpoint.checkpoint_id, build, error)}"

    async def _copy_failed(self, copy: Copy, build: Build, error: Exception) -> str:
        """As _count_failure, for one that came from the region."""
        assert self.region is not None
        message = error.message if isinstance(error, RelumeError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, RelumeError | OSError):
            log.error("restore from the region", exc_info=error)
        if await asyncio.to_thread(self.region.copies.failed, copy, error):
            self._keep(asyncio.create_task(self._remake(build)))
        return message

    def _finish_copy(self, instance: Instance) -> None:
        """The instance has what it needs of the region's checkpoint: the rest is the node's to bring."""
        copy = self._copies.pop(instance.instance_id, None)
        if copy is not None and self.region is not None:
            self.region.copies.finish(copy)

    def _count_failure(self, checkpoint_id: str, build: Build, error: Exception) -> str:
        """Count it against the checkpoint, replace that in the background if it was the last; returns why."""
        damaged = isinstance(error, Untrusted | ImageError)
        message = error.message if isinstance(error, RelumeError) else f"{type(error).__name__}: {error}"
        if isinstance(error, GpuUnavailable):
            return message  # taken by another, or its helper died: nothing against the checkpoint
        if not isinstance(error, RelumeError | OSError):
            log.error("restore of %s", checkpoint_id, exc_info=error)
        health = self._shelf.restore_failed(checkpoint_id, message, damaged=damaged)
        log.warning("restore of %s failed (%d): %s", checkpoint_id, health.failures, message)
        if health.quarantined:
            self._keep(asyncio.create_task(self._remake(build)))
        return message

    async def _remake(self, build: Build) -> None:
        """Make a new checkpoint from an instance nobody waits for."""
        if self._state.count_remake(build.build_id) > _REMAKES:
            log.warning("no third try to make a checkpoint of build %s", build.build_id)
            return
        instance = None
        try:
            with self._started(Start(build, {})) as start:
                instance = await self._boot(start, deferred=False, maker=True)
            await self._made(instance)
        except RelumeError as error:
            log.warning("no new checkpoint of %s: %s", build.app, error.message)
        finally:
            if instance is not None:
                await self.stop(instance)

    async def _made(self, instance: Instance) -> None:
        """Wait until the extra instance has had its checkpoint, or for as long as a boot may take."""
        deadline = time.monotonic() + instance.settings.boot_timeout
        offers = self.subject(instance).offers
        while self._capturer.usable(instance.build.build_id, offers) is None and time.monotonic() < deadline:
            if instance.ended.is_set():
                return
            await asyncio.sleep(0.2)

    # --- what instances tell ----------------------------------------------------------------------

    def _listen(self, instance: Instance) -> None:
        instance.keeper.on_event = lambda event: self._heard(instance, event)
        self._keep(asyncio.create_task(self._watch_keeper(instance)))

    def _heard(self, instance: Instance, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                instance.timeline = event["timeline"] | {"answers": event["at"]}
                if instance.state == "starting":
                    instance.state = "ready"
                    self._save(instance)
                instance.ready.set()
            case "pager":
                self._pager_told(instance, event["told"])
            case "failed" if instance.adopted:
                self._keep(asyncio.create_task(self._discard(instance, "failed")))
            case "request" if event["request"] not in instance.asked:
                instance.asked.add(event["request"])
                self.spawn(self._answer_request(instance, event["request"]))
            case "exit":
                instance.exit_code = event["exit_code"]
                self._keep(asyncio.create_task(self._over(instance)))

    def _pager_told(self, instance: Instance, told: dict[str, Any]) -> None:
        """Memory that could not be served has ended the instance; after it was ready, another takes its place."""
        if self.region is not None:
            self._region_hears(self.region, instance, told)
        if told["event"] != "failed":
            return
        log.error("paging of %s failed: %s", instance.instance_id, told["reason"])
        instance.paging_failed = str(told["reason"])
        instance.wrong_bytes = bool(told.get("untrusted"))
        if instance.ready.is_set() and instance.checkpoint_id is not None:
            self._keep(asyncio.create_task(self._replace(instance)))

    def _region_hears(self, region: NodeRegion, instance: Instance, told: dict[str, Any]) -> None:
        """What came from the store before the first answer; when the copy can do without; what was learned."""
        copy = self._copies.get(instance.instance_id)
        if copy is not None and "store_bytes" in told and not instance.answered:
            instance.from_store = {
                "store_bytes": copy.store_bytes + told["store_bytes"],
                "store_requests": copy.store_requests + told["store_requests"],
            }
        match told["event"]:
            case "answered":
                instance.answered = True
                if copy is not None:
                    log.info("%s answers: %s", instance.instance_id, instance.from_store)
                    if instance.settings.fill != "all":
                        self._finish_copy(instance)
            case "filled" | "gone":
                self._finish_copy(instance)
            case "recorded" if instance.checkpoint_id is not None and copy is None:
                region.learned(instance.checkpoint_id)

    async def _replace(self, instance: Instance) -> None:
        """A new instance in the place of one whose memory failed it."""
        await instance.ended.wait()
        assert instance.checkpoint_id is not None
        copy = self._copies.pop(instance.instance_id, None)
        if copy is not None:
            kind = Untrusted if instance.wrong_bytes else StoreError
            await self._copy_failed(copy, instance.build, kind(instance.paging_failed))
        else:
            await self._count_paging_failure(instance)
        started = await self.start(instance.build, environment=instance.environment)
        log.warning("%s takes the place of %s", started.instance.instance_id, instance.instance_id)

    async def _count_paging_failure(self, instance: Instance) -> None:
        assert instance.checkpoint_id is not None
        try:
            checkpoint = self._shelf.load(instance.checkpoint_id)
        except NotFound:
            return  # removed meanwhile: there is nothing to count against
        error = await self.bringup.why_paging_failed(instance, checkpoint)
        self._count_failure(checkpoint.checkpoint_id, instance.build, error)

    async def _answer_request(self, instance: Instance, request: int) -> None:
        body = await self._checkpoint(instance)
        if not instance.keeper.lost.is_set():
            await instance.keeper.answer(request, 200, body)

    async def _checkpoint(self, instance: Instance) -> dict[str, Any]:
        try:
            return await self._capturer.request(self.subject(instance))
        except GpuLost as error:
            self.spawn(self._lost(instance, error))
            return {"status": "failed", "reason": "gpu", "checkpoint_id": None, "message": error.message}
        except Exception as error:
            log.exception("checkpoint of %s", instance.instance_id)
            return {"status": "failed", "reason": "engine", "checkpoint_id": None, "message": str(error)}

    async def _lost(self, instance: Instance, error: GpuLost) -> None:
        """The driver cannot bring it back: end it, and put another in its place, which does not try again."""
        log.error("%s has lost its GPU: %s", instance.instance_id, error.message)
        await self._discard(instance, "failed")
        if not instance.maker:
            with self._started(Start(instance.build, instance.environment)) as start:
                other = await self._boot(start, deferred=True)
            log.warning("%s takes the place of %s", other.instance_id, instance.instance_id)

    async def _checkpoint_at_ready(self, instance: Instance) -> None:
        await self._note_checkpoint(instance, await self._checkpoint(instance))

    async def _note_checkpoint(self, instance: Instance, answer: dict[str, Any]) -> None:
        if not instance.keeper.lost.is_set():
            await instance.keeper.note(f"relume: checkpoint at ready: {json.dumps(answer)}")

    def subject(self, instance: Instance) -> Subject:
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

    async def _watch_keeper(self, instance: Instance) -> None:
        """A keeper that dies takes the instance's stdio along: end what is left of it."""
        await instance.keeper.lost.wait()
        if instance.exit_code is None and not instance.discarding:
            log.error("the keeper of %s is gone; ending the instance", instance.instance_id)
            await self._over(instance)

    async def _over(self, instance: Instance) -> None:
        """It has ended by itself or was stopped: take its ground away, keep its log."""
        instance.ended.set()
        if instance.start is not None:
            return  # the start sees it, and clears up
        kept = instance.ready.is_set() and not instance.keeper.lost.is_set()
        await self._discard(instance, "exited" if kept or instance.exit_code == 0 else "failed")

    async def _discard(self, instance: Instance, state: InstanceState) -> None:
        """End it if it still runs, and leave nothing of it but its log."""
        if instance.discarding:
            await instance.gone.wait()
            return
        instance.discarding = True
        if not instance.paging_failed:  # else whoever reacts to that ends the copy
            self._finish_copy(instance)
        try:
            # The keeper first: it knows what is going on, a boot or a dump, and ends that too.
            await instance.keeper.end()
            instance.ended.set()
            await instance.keeper.close()
            await asyncio.to_thread(self._ground.clear, instance.places, instance.instance_id)
        except OSError as error:
            log.error("clearing up after %s (the next run tries again): %s", instance.instance_id, error)
        finally:
            instance.state = "exited" if instance.state == "stopping" else state
            self._state.end_instance(instance.instance_id, instance.state, instance.exit_code)
            del self.instances[instance.instance_id]
            self._gpus.take_back(instance.instance_id)
            instance.gone.set()
        self.prune(instance.build.app, _KEEP_ENDED)

    async def _forget(self, instance: Instance) -> None:
        """Remove a prepared instance that nobody took; it never ran, so there is nothing to remember of it."""
        await self._discard(instance, "exited")
        shutil.rmtree(instance.places.kept, ignore_errors=True)
        self._state.forget_instance(instance.instance_id)

    # --- stop -------------------------------------------------------------------------------------

    async def stop(self, instance: Instance) -> None:
        """SIGTERM, patience, SIGKILL; returns when nothing of it is left but its log."""
        if instance.gone.is_set():
            return
        instance.state = "stopping"
        self._save(instance)
        if (start := instance.start) is not None:
            start.called_off.set()
            await start.over.wait()
        if not instance.gone.is_set():
            await self._terminate(instance)
            await self._discard(instance, "exited")

    async def call_off(self, app: str) -> None:
        """Call off what is being started of ``app``, also where there is no instance of it just now."""
        starts = [start for start in self._starts if start.build.app == app]
        for start in starts:
            start.called_off.set()
        for start in starts:
            await start.over.wait()

    async def _terminate(self, instance: Instance) -> None:
        """SIGTERM and patience, for an app that handles it.

        Without a handler the first process of a pid namespace never sees a SIGTERM (pid_namespaces(7)).
        """
        pid = int((await self._ask_pid(instance)) or 0)
        if pid and process.catches(pid, signal.SIGTERM):
            await instance.keeper.signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_PATIENCE):
                    await instance.ended.wait()
            except TimeoutError:
                pass

    async def _ask_pid(self, instance: Instance) -> int | None:
        try:
            return int((await instance.keeper.ask("hello"))["pid"])
        except EngineError:
            return None

    def find(self, target: str) -> list[Instance]:
        """The living instances that ``target`` (an instance id or an app) names. Raises NotFound."""
        if target in self.instances:
            return [self.instances[target]]
        found = [instance for instance in self.instances.values() if instance.build.app == target]
        if not found:
            raise NotFound(f"no running instance or app {target!r}", hint="relume ps shows what runs")
        return found

    # --- across restarts of the node --------------------------------------------------------------

    async def adopt(self, row: dict[str, Any], build: Build) -> bool:
        """Take a running instance over from an earlier run of this node; whether it still runs."""
        facts = row["facts"]
        early: list[dict[str, Any]] = []
        keeper = Keeper(Container(**facts["container"]), early.append)
        try:
            async with asyncio.timeout(_ADOPT_PATIENCE):
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
        self.instances[instance.instance_id] = instance
        instance.asked.update(told["requests"])
        self._listen(instance)
        for event in early:  # between its first word and our listening
            self._heard(instance, event)
        self.spawn(self._see_through(instance, told))
        return True

    async def _see_through(self, instance: Instance, told: dict[str, Any]) -> None:
        """Bring to an end what an earlier run of this node began with the instance, and nobody else will."""
        checkpointed = await self._catch_up(instance, told)
        try:
            await instance.until_ready(instance.settings.boot_timeout)
        except StartFailed as error:
            log.warning("%s", error.message)
            await self._discard(instance, "failed")
            return
        if instance.settings.trigger == "ready" and not instance.restored and not checkpointed:
            await self._checkpoint_at_ready(instance)
        if instance.maker:
            await self._made(instance)
            await self.stop(instance)

    async def _catch_up(self, instance: Instance, told: dict[str, Any]) -> bool:
        """Answer what waits: a dump that was going on first. Returns whether the instance has its checkpoint."""
        dump = told["dump"]
        resumed = await self._resume(instance)
        answer = resumed or (dump and self._capturer.unsaid(self.subject(instance), dump["dump_id"]))
        # Who asks while a dump goes on is told so; of those who wait, only one that asked before it is its cause.
        causes = dump["requests"] if dump else told["requests"]
        for request in told["requests"]:
            if answer and request in causes:
                await instance.keeper.answer(request, 200, answer)
                causes = []
            else:
                await self._answer_request(instance, request)
        if resumed and instance.settings.trigger == "ready":
            await self._note_checkpoint(instance, resumed)
        return bool(answer)

    async def _resume(self, instance: Instance) -> dict[str, Any] | None:
        """The answer of a checkpoint that an earlier run of this node began."""
        unfinished = [one for one in self._shelf.unfinished() if one.instance_id == instance.instance_id]
        if instance.gpu is not None:
            await self._give_back(instance, unfinished)
        for intent in unfinished:
            return await self._capturer.resume(self.subject(instance), intent)
        return None

    async def _give_back(self, instance: Instance, unfinished: list[Intent]) -> None:
        """An earlier run of this node may have ended with the device memory put away: undo it after the dump."""
        try:
            for intent in unfinished:
                await instance.keeper.dumped(intent.dump_id)
            await self._gpus.memory.recover(cgroup.processes(instance.places.cgroup))
        except GpuLost as error:
            self.spawn(self._lost(instance, error))
        except RelumeError as error:
            log.error("the GPU of %s cannot be looked at: %s", instance.instance_id, error.message)

    # --- the rest ---------------------------------------------------------------------------------

    def prune(self, app: str, keep: int) -> None:
        """Forget ended instances of ``app`` but the newest ``keep``, with their logs."""
        for instance_id in self._state.prunable(app, keep):
            shutil.rmtree(self._places.instance(instance_id).kept, ignore_errors=True)
            self._state.forget_instance(instance_id)

    def log_of(self, target: str) -> Path:
        """The log of an instance, or of an app's newest instance. Raises NotFound."""
        for row in reversed(self._state.instances()):
            if target in (row["instance_id"], row["app"]) and not row["facts"].get("maker"):
                return self._places.instance(row["instance_id"]).log
        raise NotFound(f"no instance or app {target!r}", hint="relume ps shows the instances")

    def _save(self, instance: Instance) -> None:
        self._state.save_instance(
            instance.instance_id,
            app=instance.build.app,
            build_id=instance.build.build_id,
            state=instance.state,
            started_at=instance.started_at,
            facts=instance.facts(),
        )

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` beside everything else; what it raises is logged."""
        task = asyncio.create_task(work)
        self._keep(task)
        return task

    async def close(self) -> None:
        """Drop the connections; the instances run on, and so do starts that have come to runc."""
        beginning = [start for start in self._starts if not start.under_way]
        for start in beginning:
            start.called_off.set()
        for start in beginning:
            await start.over.wait()
        for instance in [one for one in self.instances.values() if one.discarding]:
            await instance.gone.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for instance in self.instances.values():
            await instance.keeper.close()


def _report(task: asyncio.Task[Any]) -> None:
    if (
        not task.cancelled()
        and (error := task.exception()) is not None
        and not isinstance(error, RelumeError)
    ):
        log.error("background work failed", exc_info=error)
