"""What happens on ``POST /checkpoint``, top to bottom.

    ask -> skip? -> would it work? -> is there room? -> freeze, dump, thaw -> finish -> answer

Guarantees: the app is never stopped longer than the dump takes, never at all where a look at /proc shows
that the dump would fail, and always runs again, whatever fails; a checkpoint that is visible is whole and on
disk; a failed one leaves no file behind. The answer is always 200 with a ``status``: the app's request must
not be the thing that takes it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from relume.checkpoint import staging
from relume.checkpoint.device import DeviceMemory, GpuShare, record_of
from relume.checkpoint.forecast import file_bytes, forecast
from relume.checkpoint.platform import NO_GPU, Offers, Platform, differences
from relume.checkpoint.policy import Situation, SkipReason, skip
from relume.checkpoint.shelf import Checkpoint, Intent, Shelf, size_of
from relume.engine import criulog, edit, held, options, preflight, tmpfs
from relume.engine.jobs import DumpJob, DumpResult
from relume.errors import (
    GpuError,
    GpuLost,
    GpuMemory,
    GpuUnsupported,
    NotFound,
    RelumeError,
    Unsupported,
)
from relume.images import integrity, lazy_bytes
from relume.images.mappings import saved_by_mapping
from relume.keeper.client import Keeper
from relume.linux import cgroup, memory, proc

log = logging.getLogger(__name__)

_HEADROOM = 64 << 20
"""Bytes to be left free on the disk after the dump, and of memory during it."""

_PAUSES_WHEN_BUSY = (0.2, 1.0)
"""Seconds before another try when the dump failed for something transient, e.g. a client not yet accepted."""

_SLOWEST_DISK = 50e6
"""Bytes per second below which a dump is given up: the app stands still for as long as it takes."""

_SHARED = ("/persistent-storage",)
"""Where all instances of an app have the same files."""


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """The instance that asks. ``rootfs`` is its mounted overlay, ``upper`` the writable layer on disk."""

    instance_id: str
    app: str
    build_id: str
    keeper: Keeper
    upper: Path
    rootfs: Path
    cgroup: str
    id_base: int
    checkpointing: bool
    restored: bool
    deferred: bool
    loopback: str
    filesystem: str
    held_limit: int
    memory_limit: int | None = None
    gpu: GpuShare | None = None

    @property
    def offers(self) -> Offers:
        """Its GPUs, as a platform has them: what a checkpoint of it will need."""
        return (self.gpu.facts,) if self.gpu else NO_GPU


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What a dump will write, in bytes: ``memory`` into the images, ``files`` of the layer beside them."""

    memory: int
    files: int

    @property
    def total(self) -> int:
        return self.memory + self.files


@dataclasses.dataclass(frozen=True, slots=True)
class Elsewhere:
    """Why no checkpoint is made here: another node has it (``checkpoint_id``), or is at it."""

    reason: SkipReason
    checkpoint_id: str | None = None


class Claim(Protocol):
    """The right to make a build's checkpoint, in the whole region."""

    def settle(self, checkpoint_id: str | None) -> None:
        """It was made and may be published, or (None) was not made. Called once; returns at once."""


class Region(Protocol):
    """The nodes that share checkpoints with this one."""

    async def claim(self, app: str, build_id: str) -> Claim | Elsewhere:
        """Raises nothing: a store that does not answer keeps no app from its checkpoint."""


class Capturer:
    """Makes the checkpoints of one node, one at a time for each build; with a region, one in all of it."""

    def __init__(
        self,
        shelf: Shelf,
        platform: Platform,
        device: DeviceMemory,
        region: Region | None = None,
        dumps_in_memory: staging.Policy = "auto",
    ) -> None:
        """``platform`` is this machine without its GPUs; those are each instance's own."""
        self._dumps_in_memory = dumps_in_memory
        self._shelf = shelf
        self._platform = platform
        self._device = device
        self._region = region
        self._in_progress: set[str] = set()

    async def request(self, subject: Subject) -> dict[str, Any]:
        """The body of the answer to one request."""
        situation = self._situation(subject)
        if (reason := skip(situation)) is not None:
            existing = self.usable(subject.build_id, subject.offers)
            return _answer(subject, "skipped", reason, checkpoint_id=existing and existing.checkpoint_id)
        self._in_progress.add(subject.build_id)
        try:
            if self._region is None or subject.gpu is not None:  # device memory does not travel
                return await self._make(subject)
            return await self._make_for(self._region, subject)
        finally:
            self._in_progress.discard(subject.build_id)

    async def _make_for(self, region: Region, subject: Subject) -> dict[str, Any]:
        """Make it unless the region has it or is at it; the app gets its answer before it is published there."""
        claim = await region.claim(subject.app, subject.build_id)
        if isinstance(claim, Elsewhere):
            return _answer(subject, "skipped", claim.reason, checkpoint_id=claim.checkpoint_id)
        made = None
        try:
            answer = await self._make(subject)
            made = answer["checkpoint_id"]
            return answer
        finally:
            claim.settle(made)

    def _situation(self, subject: Subject) -> Situation:
        return Situation(
            checkpointing=subject.checkpointing,
            restored=subject.restored,
            deferred=subject.deferred,
            exists=self.usable(subject.build_id, subject.offers) is not None,
            in_progress=subject.build_id in self._in_progress,
        )

    async def resume(self, subject: Subject, intent: Intent) -> dict[str, Any] | None:
        """Finish what an earlier run of this node began: the keeper has the dump, or is still at it.

        Returns the answer, or None where it had not come to the dump and nothing is lost by asking anew.
        """
        self._in_progress.add(subject.build_id)
        try:
            if (checkpoint := self._shelf.completed(intent.dump_id)) is not None:
                return await self._publish(subject, intent, checkpoint)
            result = await subject.keeper.dumped(intent.dump_id)
            if result is None:
                self._shelf.abandon(intent.dump_id)
                return None
            return await self._finish(subject, intent, result)
        except (RelumeError, OSError) as error:
            return self._give_up(subject, intent, error)
        finally:
            self._in_progress.discard(subject.build_id)

    def unsaid(self, subject: Subject, dump_id: str) -> dict[str, Any] | None:
        """The answer for a dump that an earlier run published, and was killed before it could say so."""
        try:
            checkpoint = self._shelf.load(f"cp-{dump_id}")
        except NotFound:
            return None
        return _created(subject, checkpoint, seconds=checkpoint.timings["dump_s"])

    def usable(self, build_id: str, offers: Offers = NO_GPU) -> Checkpoint | None:
        """The newest checkpoint of the build that fits this machine, and GPUs offered, and is not quarantined."""
        for checkpoint in reversed(self._shelf.of_build(build_id)):
            fits = not differences(checkpoint.platform, self._platform, offers)
            health = self._shelf.health(checkpoint.checkpoint_id)
            if fits and not health.quarantined and not self._shelf.why_aside(checkpoint.checkpoint_id):
                return checkpoint
        return None

    def why_not(self, build_id: str, offers: Offers = NO_GPU) -> str:
        """Why the build has no usable checkpoint, in words."""
        if build_id in self._in_progress:
            return "its checkpoint is still being made"
        checkpoints = self._shelf.of_build(build_id)
        if not checkpoints:
            return "no checkpoint of this build yet"
        newest = checkpoints[-1]
        health = self._shelf.health(newest.checkpoint_id)
        if health.quarantined:
            return f"checkpoint {newest.checkpoint_id} is quarantined: {health.reason}"
        if aside := self._shelf.why_aside(newest.checkpoint_id):
            return aside
        reasons = differences(newest.platform, self._platform, offers)
        return f"checkpoint {newest.checkpoint_id} does not fit this machine: {'; '.join(reasons)}"

    async def explain(self, subject: Subject) -> dict[str, Any]:
        """What a request of this instance would come to now; stops nothing."""
        looked = await self._look(subject)
        return await asyncio.to_thread(self._explained, subject, looked)

    def _explained(self, subject: Subject, looked: dict[str, Any] | Expected) -> dict[str, Any]:
        expected = forecast(
            cgroup.processes(subject.cgroup),
            rootfs=subject.rootfs,
            upper=subject.upper,
            everything=subject.filesystem == "all",
            past=self._shelf.all(),
        )
        return {
            "instance_id": subject.instance_id,
            "would_work": not isinstance(looked, dict),
            "skipped": skip(self._situation(subject)),
            "problem": looked if isinstance(looked, dict) else None,
            "processes": expected.processes,
            "memory_bytes": expected.memory_bytes,
            "held_bytes": expected.held_bytes,
            "frozen_s": expected.frozen_s,
        }

    # --- the story --------------------------------------------------------------------------------

    async def _make(self, subject: Subject) -> dict[str, Any]:
        looked = await self._look(subject)
        if isinstance(looked, dict):
            return looked
        for pause in _PAUSES_WHEN_BUSY:
            answer, busy = await self._try(subject, looked)
            if not busy:
                return answer
            await asyncio.sleep(pause)  # the app runs meanwhile, and gets out of what the dump found it in
        answer, _ = await self._try(subject, looked)
        return answer

    async def _try(self, subject: Subject, expected: Expected) -> tuple[dict[str, Any], bool]:
        """One dump: the answer, and whether it failed for something that passes by itself."""
        try:
            directory, intent = self._shelf.begin(
                instance_id=subject.instance_id, app=subject.app, build_id=subject.build_id, now=time.time()
            )
        except OSError as error:
            return _broken(subject, error), False
        try:
            result = await self._dump(subject, self._job(subject, intent, directory, expected))
            busy = bool(result.error) and criulog.explain(directory / "work" / "dump.log").kind == "busy"
            return await self._finish(subject, intent, result), busy
        except GpuLost:
            self._shelf.abandon(intent.dump_id)
            raise  # the instance cannot go on
        except (RelumeError, OSError) as error:
            return self._give_up(subject, intent, error), False
        except asyncio.CancelledError:
            raise  # the node is going; the next one finishes it
        except BaseException:
            self._shelf.abandon(intent.dump_id)
            raise

    async def _dump(self, subject: Subject, job: DumpJob) -> DumpResult:
        if subject.gpu is None:
            return await subject.keeper.dump(job)
        pids = cgroup.processes(subject.cgroup)
        return await self._device.around(subject.gpu, pids, Path(job.work), lambda: subject.keeper.dump(job))

    async def _look(self, subject: Subject) -> dict[str, Any] | Expected:
        """Before anything stops: what to expect, or the answer that says why not."""
        device_bytes = 0
        if subject.gpu is not None:
            try:
                device_bytes = await self._device.examine(
                    cgroup.processes(subject.cgroup),
                    memory_limit=subject.memory_limit,
                    host_bytes=cgroup.memory(subject.cgroup)[0],
                    available_bytes=memory.machine().available,
                )
            except GpuError as error:
                return _gpu_failed(subject, error)
        return await asyncio.to_thread(self._look_at_host, subject, device_bytes)

    def _look_at_host(self, subject: Subject, device_bytes: int) -> dict[str, Any] | Expected:
        pids = cgroup.processes(subject.cgroup)
        culprits = preflight.examine(
            pids,
            rootfs=subject.rootfs,
            upper=subject.upper,
            held_limit=None if subject.filesystem == "all" else subject.held_limit,
            gpu=subject.gpu is not None,
        )
        if culprits:
            return _unsupported(subject, [dataclasses.asdict(culprit) for culprit in culprits])
        expected = Expected(
            memory=preflight.estimate(pids).total + device_bytes,
            files=file_bytes(
                pids, rootfs=subject.rootfs, upper=subject.upper, everything=subject.filesystem == "all"
            ),
        )
        free = _free(self._shelf)
        if expected.total + _HEADROOM > free:
            return _answer(
                subject,
                "failed",
                "insufficient_disk",
                message=f"the dump needs about {expected.total} bytes, {free} are free",
                needed_bytes=expected.total + _HEADROOM,
                free_bytes=free,
            )
        available = memory.machine().available
        if available < _HEADROOM:
            return _answer(
                subject,
                "failed",
                "insufficient_memory",
                message=f"{available} bytes of memory are available, the dump needs {_HEADROOM}",
                needed_bytes=_HEADROOM,
                free_bytes=available,
            )
        return expected

    def _job(self, subject: Subject, intent: Intent, directory: Path, expected: Expected) -> DumpJob:
        places = {name: directory / name for name in ("images", "work", "held")}
        for place in places.values():
            place.mkdir(mode=0o700)
        if staging.wanted(expected.memory, staging.measure(), self._dumps_in_memory):
            staging.stage(places["images"], expected.memory)
        script = Path(subject.keeper.container.runtime) / "post-dump"
        return DumpJob(
            dump_id=intent.dump_id,
            images=str(places["images"]),
            work=str(places["work"]),
            held=str(places["held"]),
            upper=str(subject.upper),
            id_base=subject.id_base,
            options=options.for_dump(loopback=subject.loopback, action_script=script, work=places["work"]),
            held_limit=subject.held_limit,
            everything=subject.filesystem == "all",
            timeout=30 + expected.total / _SLOWEST_DISK,
            also=subject.gpu.made if subject.gpu else (),
        )

    async def _finish(self, subject: Subject, intent: Intent, result: DumpResult) -> dict[str, Any]:
        """The app runs again. Make the images fit for copies, hash them, publish; or say why not."""
        directory = self._shelf.making(intent.dump_id)
        if result.error or result.culprits:
            try:
                return self._failed(subject, directory, result)
            finally:
                self._shelf.abandon(intent.dump_id)
        checkpoint = await asyncio.to_thread(self._complete, subject, intent, result, directory)
        return await self._publish(subject, intent, checkpoint)

    async def _publish(self, subject: Subject, intent: Intent, checkpoint: Checkpoint) -> dict[str, Any]:
        await asyncio.to_thread(self._shelf.publish, intent.dump_id, checkpoint)
        return _created(subject, checkpoint, seconds=time.time() - intent.started_at)

    def _give_up(self, subject: Subject, intent: Intent, error: RelumeError | OSError) -> dict[str, Any]:
        self._shelf.abandon(intent.dump_id)
        return _broken(subject, error)

    def _complete(self, subject: Subject, intent: Intent, result: DumpResult, directory: Path) -> Checkpoint:
        started = time.monotonic()
        images = directory / "images"
        staged = staging.land(images)
        landed = time.monotonic()
        edited_images = edit.prepare_images(
            images, loopback=subject.loopback, shared=_SHARED, sockets=result.held.get("sockets")
        )
        tmpfs.lighten(images)
        edited = time.monotonic()
        integrity.record(images)
        hashed = time.monotonic()
        times = edit.read_stats(directory / "work")
        mounted = _mounted(subject)
        if subject.filesystem != "all":
            held.add_directories(subject.upper, directory / "held", id_base=subject.id_base, mounted=mounted)
        left = held.survey(subject.upper, directory / "held", id_base=subject.id_base, mounted=mounted)
        return Checkpoint(
            checkpoint_id=f"cp-{intent.dump_id}",
            app=subject.app,
            build_id=subject.build_id,
            instance_id=subject.instance_id,
            platform=dataclasses.replace(self._platform, gpu=subject.offers[0]),
            created_at=time.time(),
            size_bytes=size_of(images) + size_of(directory / "held"),
            needs_network=edited_images.needs_network,
            lazy_bytes=sum(lazy_bytes(images).values()),
            frozen_s=times.frozen_us / 1e6,
            timings={
                "freezing_s": times.freezing_us / 1e6,
                "frozen_s": times.frozen_us / 1e6,
                "memdump_s": times.memdump_us / 1e6,
                "memwrite_s": times.memwrite_us / 1e6,
                "held_files_s": result.copy_seconds,
                "dump_s": result.seconds,
                **({"landing_s": landed - started} if staged else {}),
                "edit_s": edited - landed,
                "hash_s": hashed - edited,
            },
            id_base=subject.id_base,
            loopback=subject.loopback,
            filesystem=subject.filesystem,
            processes=_legible([dataclasses.asdict(process) for process in edit.processes(images)]),
            stopped=edit.stopped(images),
            left_behind=_legible(dataclasses.asdict(left)),
            warnings=_legible([*result.held.get("warnings", ()), *edited_images.warnings]),
            affinity=result.affinity,
            memory=_legible([dataclasses.asdict(mapped) for mapped in saved_by_mapping(images)]),
            gpu=record_of(directory / "work"),
            own_files=list(result.held.get("own_files", ())),
        )

    def _failed(self, subject: Subject, directory: Path, result: DumpResult) -> dict[str, Any]:
        if result.culprits:
            return _unsupported(subject, result.culprits)
        if result.app_gone:
            return _answer(subject, "failed", "engine", message="the app ended during its checkpoint")
        if result.killed:
            message = f"{result.killed} was killed during the checkpoint"
            return _answer(subject, "failed", "engine", message=message)
        verdict = criulog.explain(directory / "work" / "dump.log")
        log.warning("dump of %s failed: %s (%s)", subject.instance_id, result.error, verdict.reason)
        if verdict.culprits:
            return _unsupported(subject, [dataclasses.asdict(culprit) for culprit in verdict.culprits])
        reason = {"disk": "insufficient_disk", "memory": "insufficient_memory"}.get(verdict.kind, "engine")
        if result.no_space:
            reason = "insufficient_disk"
        return _answer(subject, "failed", reason, message=verdict.reason or result.error)


def _answer(subject: Subject, status: str, reason: str | None, **more: Any) -> dict[str, Any]:
    base = {"status": status, "reason": reason, "checkpoint_id": None, "build_id": subject.build_id}
    if status == "failed":
        log.warning("checkpoint of %s failed: %s: %s", subject.instance_id, reason, more.get("message", ""))
    answer: dict[str, Any] = _legible(base | {"instance_id": subject.instance_id} | more)
    return answer


def _created(subject: Subject, checkpoint: Checkpoint, *, seconds: float) -> dict[str, Any]:
    return _answer(
        subject,
        "created",
        None,
        checkpoint_id=checkpoint.checkpoint_id,
        frozen_ms=round(checkpoint.frozen_s * 1000),
        size_bytes=checkpoint.size_bytes,
        seconds=round(seconds, 3),
        left_behind=checkpoint.left_behind,
        warnings=checkpoint.warnings,
    )


def _broken(subject: Subject, error: RelumeError | OSError) -> dict[str, Any]:
    if isinstance(error, GpuError):
        return _gpu_failed(subject, error)
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return _answer(subject, "failed", "insufficient_disk" if full else "engine", message=str(error))


def _gpu_failed(subject: Subject, error: GpuError) -> dict[str, Any]:
    """Nothing was frozen, or all of it runs again."""
    if isinstance(error, GpuUnsupported):
        culprits = error.details.get("obstacles") or [{"what": error.message, "hint": error.hint}]
        return _answer(subject, "failed", Unsupported.code, message=error.message, unsupported=culprits)
    if isinstance(error, GpuMemory):
        numbers = error.details
        return _answer(
            subject,
            "failed",
            "insufficient_memory",
            message=error.message,
            hint=error.hint,
            needed_bytes=numbers["host_bytes"] + numbers["device_bytes"],
            device_bytes=numbers["device_bytes"],
            free_bytes=numbers["limit_bytes"],
        )
    return _answer(subject, "failed", "gpu", message=error.message, hint=error.hint, code=error.code)


def _unsupported(subject: Subject, culprits: list[dict[str, Any]]) -> dict[str, Any]:
    first = culprits[0]
    who = f"{first.get('process', '?')} (pid {first.get('pid', '?')}): " if first.get("process") else ""
    message = f"{who}{first['what']}"
    return _answer(subject, "failed", Unsupported.code, message=message, unsupported=culprits)


def _mounted(subject: Subject) -> set[str]:
    """Where something is mounted in it; nothing when it has just ended."""
    for pid in cgroup.processes(subject.cgroup):
        with contextlib.suppress(*proc.GONE):
            return {mount.point for mount in proc.mounts(pid)}
    return set()


def _free(shelf: Shelf) -> int:
    return shutil.disk_usage(shelf.root).free


def _legible(value: Any) -> Any:
    """``value`` as JSON that everybody reads: a name need be no UTF-8, and the surrogates in its place are no text."""
    match value:
        case str():
            return value.encode(errors="surrogateescape").decode(errors="replace")
        case dict():
            return {key: _legible(each) for key, each in value.items()}
        case list() | tuple():
            return [_legible(each) for each in value]
    return value
