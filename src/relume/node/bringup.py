"""How a container comes up: cold, from a checkpoint, or from a checkpoint and held before its first instruction.

Each coroutine ends with a ready (or prepared) instance or raises what went wrong, StartFailed if the start was
called off; taking away what was made is the caller's (relume.node.lifecycle), who has to say what comes next
anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from relume.build import Build
from relume.checkpoint.restore import FIRST_LINE, Restoration, why_eager
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.engine import criulog
from relume.engine.lazy_pages import DAEMON
from relume.errors import EngineError, HostError, PagerError, StoreError, Untrusted
from relume.keeper.client import KeeperLost
from relume.keeper.instance import Assignment
from relume.node.gpus import Gpus
from relume.node.ground import Ground
from relume.node.instance import SLOWEST_DISK, Instance
from relume.node.places import Places
from relume.node.secrets import Secrets
from relume.node.settings import Settings
from relume.node.start import Start
from relume.pager.job import CRIU_ENDED
from relume.sidecar import ADDRESS

if TYPE_CHECKING:
    from relume.node.region import Copy, NodeRegion

_RESTORE_PATIENCE = 60.0
"""Seconds for a copy to become ready; it was ready, or on its way, when it was saved."""

_NEVER = 1e9

_ON_A_GPU = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""torch.compile keeps a pool of forked processes, each with the GPU's devices open and without a CUDA context: neither
the driver nor CRIU can save those (seen with torch 2.11 on an H100). With one thread there is no pool."""

T = TypeVar("T")


class BringUp:
    """Brings up instances of one node."""

    def __init__(
        self,
        places: Places,
        shelf: Shelf,
        ground: Ground,
        gpus: Gpus,
        region: NodeRegion | None,
        *,
        log_limit: int,
        pages_lazily: bool,
    ) -> None:
        self._places = places
        self._shelf = shelf
        self._ground = ground
        self._gpus = gpus
        self._region = region
        self._log_limit = log_limit
        self._pages_lazily = pages_lazily

    async def boot(self, instance: Instance, start: Start) -> None:
        """Cold. Raises EngineError, StartFailed, OSError."""
        await asyncio.to_thread(
            self._ground.lay,
            instance.places,
            instance.build,
            id_base=instance.id_base,
            top=None,
            copy=False,
        )
        start.trace.mark("layer")
        await self._assign(instance, start)
        start.go()
        boot_timeout = instance.settings.boot_timeout
        await start.unless_called_off(_within(boot_timeout, instance.keeper.boot(), "runc"))
        await start.unless_called_off(instance.until_ready(boot_timeout))

    async def restore(
        self, instance: Instance, checkpoint: Checkpoint, start: Start, memory: str, copy: Copy | None = None
    ) -> asyncio.Task[Any]:
        """From ``checkpoint``, or ``copy``, the region's; returns what is left of runc's part, which ends a moment
        after the app answers.

        Raises Untrusted or ImageError for a damaged checkpoint, EngineError and PagerError with CRIU's or the
        pager's reason in words, StartFailed when it does not become ready.
        """
        restoration = self._restoration(instance, checkpoint, copy)
        try:
            pager = self._pager_job(instance, restoration, memory)
            if copy is not None and not copy.complete:
                if pager is None or memory == "criu":
                    assert self._region is not None
                    await asyncio.to_thread(self._region.copies.complete, copy)
                else:
                    pager |= {"remote": copy.job, "verify": None}
            verify = pager is None or pager.get("daemon") == DAEMON  # ours verifies what it hands out
            await asyncio.to_thread(self._lay_copy, instance, restoration, verify_pages=verify)
            start.trace.mark("layer")
            await self._assign(instance, start, first_line=FIRST_LINE)
            start.go()
            places = instance.places
            job = restoration.job(
                images=places.images, work=places.criu_work, cgroup=places.cgroup, pager=pager
            )
            coming = asyncio.create_task(instance.keeper.restore(job))
            coming.add_done_callback(_retrieved)
            if instance.grant is not None:
                told = await start.unless_called_off(coming)
                if pager is not None:
                    await start.unless_called_off(instance.until_whole(checkpoint.lazy_bytes))
                    start.trace.mark("whole")
                reviving = self._gpus.revive(instance.grant, told["pid"], places.cgroup, checkpoint.gpu)
                await start.unless_called_off(reviving)
                instance.gpu_given = True
                start.trace.mark("gpu")
            # runc returns some time after the app runs: whoever is first, readiness or failure, decides.
            await start.unless_called_off(_first(coming, instance.until_ready(_RESTORE_PATIENCE)))
        except Exception as error:
            raise await self._reason(instance, restoration, error) from error
        if copy is None:
            self._shelf.restore_worked(checkpoint.checkpoint_id)
        return coming

    async def prepare(self, instance: Instance, checkpoint: Checkpoint, start: Start) -> None:
        """From ``checkpoint``, and stopped before its first instruction. Raises as :meth:`restore`."""
        restoration = self._restoration(instance, checkpoint)
        try:
            pager = self._pager_job(instance, restoration, "prepared")
            await asyncio.to_thread(self._lay_copy, instance, restoration, verify_pages=pager is None)
            await self._assign(instance, start)
            start.go()
            places = instance.places
            job = restoration.job(
                images=places.images, work=places.criu_work, cgroup=places.cgroup, pager=pager, stopped=True
            )
            read_first = 0 if pager is not None else checkpoint.size_bytes
            patience = _RESTORE_PATIENCE + read_first / SLOWEST_DISK
            await start.unless_called_off(_within(patience, instance.keeper.restore(job), "CRIU"))
        except Exception as error:
            raise await self._reason(instance, restoration, error) from error

    async def resume(self, instance: Instance, checkpoint: Checkpoint, start: Start) -> None:
        """Let a prepared instance run, with today's environment. Raises EngineError, StartFailed."""
        merged = self.environment(instance.build, start.environment)
        start.under_way = True
        await instance.keeper.resume(merged, dict(start.environment), FIRST_LINE, checkpoint.stopped)
        start.trace.mark("resumed")
        await start.unless_called_off(instance.until_ready(_RESTORE_PATIENCE))

    def environment(self, build: Build, extra: Mapping[str, str], *, gpu: bool = False) -> dict[str, str]:
        """What the app's first process gets: ours, then the image's, then secrets, then the caller's."""
        merged = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "HOSTNAME": build.app,
            "PORT": str(build.port),
            # A log is read while the app runs, and a pipe would make Python keep its lines back.
            "PYTHONUNBUFFERED": "1",
            **(_ON_A_GPU if gpu and build.checkpointing else {}),
            **build.env,
            **Secrets(self._places.secrets(build.app)).all(),
            **extra,
        }
        for name in ("NO_PROXY", "no_proxy"):
            hosts = [host for host in merged.get(name, "").split(",") if host]
            if ADDRESS not in hosts:
                merged[name] = ",".join([*hosts, ADDRESS])
        return merged

    async def why_paging_failed(self, instance: Instance, checkpoint: Checkpoint) -> Exception:
        """The error behind an instance that its pager ended: the image's damage, if that is what it was."""
        return await self._paging_reason(instance, self._restoration(instance, checkpoint))

    def how_memory_comes(self, checkpoint: Checkpoint, settings: Settings) -> str:
        """To a copy: "paged", or "eager: " and why."""
        why = why_eager(checkpoint, settings.limits.memory)
        if not self._pages_lazily:
            why = "userfaultfd is not allowed on this node"
        return f"eager: {why}" if why else "paged"

    # --- pieces -----------------------------------------------------------------------------------

    def _restoration(
        self, instance: Instance, checkpoint: Checkpoint, copy: Copy | None = None
    ) -> Restoration:
        fetched = copy.directory if copy is not None else None
        return Restoration(self._shelf, checkpoint, instance.id_base, self._places.verified, fetched)

    def _pager_job(self, instance: Instance, restoration: Restoration, memory: str) -> dict[str, Any] | None:
        """The pager's job, or None (and why, in ``instance.memory``) to read all memory before the app runs."""
        settings = instance.settings
        instance.memory = self.how_memory_comes(restoration.checkpoint, settings)
        if memory == "criu" and restoration.checkpoint.gpu:
            instance.memory = (
                "eager: CRIU's daemon cannot bring a GPU's processes in before the driver needs them"
            )
        if memory == "eager":
            instance.memory = "eager: asked for"
        if instance.memory != "paged":
            return None
        job = restoration.pager_job(
            work=instance.places.criu_work,
            cgroup=instance.places.cgroup,
            fill=settings.fill,
            root=instance.places.rootfs,
            learn=memory != "unlearned",
        )
        if memory == "criu":
            return {"daemon": DAEMON, "images": job["images"], "work_dir": job["work_dir"]}
        if memory == "prepared":
            # It waits for somebody, and nobody touches its memory meanwhile: learning and fill wait for its answer.
            job |= {"record_limit_s": _NEVER, "timed": False}
            if settings.prepared_fill == "none":
                job |= {"working_set": None, "record": None}
        return job

    def _lay_copy(self, instance: Instance, restoration: Restoration, *, verify_pages: bool) -> None:
        """All of a copy's ground; blocking. Raises Untrusted or ImageError for a damaged checkpoint."""
        restoration.verify(pages=verify_pages)
        restoration.lay_files(instance.places.upper)
        self._ground.lay(
            instance.places, instance.build, id_base=instance.id_base, top=restoration.lower_layer, copy=True
        )
        self._ground.show_images(instance.places, restoration.images, id_base=instance.id_base)

    async def _assign(self, instance: Instance, start: Start, *, first_line: str = "") -> None:
        """Bundle and keeper: after this only runc is missing."""
        build, settings = instance.build, instance.settings
        merged = self.environment(build, start.environment, gpu=instance.grant is not None)
        await asyncio.to_thread(
            self._ground.bundle,
            instance.places,
            build,
            settings,
            id_base=instance.id_base,
            environment=merged,
            edits=instance.grant.edits if instance.grant else None,
        )
        instance.port = await instance.keeper.assign(
            Assignment(
                app=build.app,
                build_id=build.build_id,
                checkpointing=build.checkpointing,
                restored=instance.restored,
                checkpoint_id=instance.checkpoint_id,
                environment=merged,
                port=build.port,
                readycheck=settings.readycheck,
                log=str(instance.places.log),
                log_limit=self._log_limit,
                exit_file=str(instance.places.exit_file),
                id_base=instance.id_base,
                first_line=first_line,
                given=dict(start.environment),
            )
        )

    async def _hear_the_pager(self, instance: Instance) -> None:
        """runc's failure may be heard before the pager's, which was its cause."""
        for _ in range(20):
            if instance.paging_failed or instance.keeper.lost.is_set():
                return
            await asyncio.sleep(0.02)

    async def _paging_reason(self, instance: Instance, restoration: Restoration) -> Exception:
        try:
            await asyncio.to_thread(restoration.verify, pages=True)
        except Exception as damage:
            return damage
        if instance.paging_failed == CRIU_ENDED and (said := _criu_says(instance)).reason:
            return (HostError if said.kind == "disk" else EngineError)(said.reason, hint=said.hint)
        return PagerError(instance.paging_failed)

    async def _reason(self, instance: Instance, restoration: Restoration, error: Exception) -> Exception:
        """The error that says why a restore failed."""
        if isinstance(error, KeeperLost):
            return error  # what else is to be seen is what that led to
        if instance.memory == "paged":
            await self._hear_the_pager(instance)
        if instance.paging_failed and restoration.fetched is not None:
            kind = Untrusted if instance.wrong_bytes else StoreError
            return kind(instance.paging_failed)
        if instance.paging_failed:
            return await self._paging_reason(instance, restoration)
        if isinstance(error, EngineError):
            said = _criu_says(instance)
            if said.kind == "disk":
                return HostError(said.reason, hint=said.hint)
            if said.reason:
                return EngineError(said.reason, hint=error.hint)
        return error


def _criu_says(instance: Instance) -> criulog.Explanation:
    """Why its restore failed, by CRIU's log; a ``reason`` of "" if that does not say."""
    return criulog.explain(instance.places.criu_work / "restore.log")


async def _within(seconds: float, coming: Coroutine[Any, Any, T], who: str) -> T:
    """Wait for ``coming``, which is ``who``'s work. Raises EngineError when that takes too long."""
    try:
        async with asyncio.timeout(seconds):
            return await coming
    except TimeoutError:
        raise EngineError(
            f"{who} was not done after {seconds:g} s", hint="is it stopped, or does a disk hang?"
        ) from None


async def _first(coming: asyncio.Task[Any], readiness: Coroutine[Any, Any, None]) -> None:
    """Wait for ``readiness``, or for ``coming`` to fail."""
    waiting = asyncio.create_task(readiness)
    try:
        await asyncio.wait({coming, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            coming.result()
        await waiting
    finally:
        waiting.cancel()


def _retrieved(task: asyncio.Task[Any]) -> None:
    """What it raised has been said, or is of no interest any more: no complaint that nobody asked."""
    if not task.cancelled():
        task.exception()
