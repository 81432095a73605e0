"""What happens to an instance's GPU state at a checkpoint and at a restore, top to bottom.

    checkpoint   suspend: lock all, then checkpoint all     (then the engine freezes, dumps, thaws)
                 resume:  restore all, then unlock all      (the original goes on)
    restore      restore: restore all, then unlock all      (after CRIU revived the copy)

Guarantee: after any of these every process is running and unlocked, or GpuLost names those that are not, and the caller
must kill the instance and boot it. ``suspend`` that fails for another reason has undone what it did. That
holds for errors, time-outs, a death of the helper and cancellation; what a driver does beyond its documentation
is not covered (a process in state FAILED stays there: cuda-checkpoint's README promises nothing for it).

Nothing else must use the GPU's freed memory between ``suspend`` and ``resume``. If another tenant took it, the restore
waits for it to be free: tried too early it fails, and every later try with it (cuda-checkpoint #44).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from relume.errors import GpuError, GpuLost, GpuTimeout, GpuUnsupported, RelumeError
from relume.gpu.client import AsyncGpuDriver
from relume.gpu.driver import (
    NO_CONTEXT,
    NOT_READY,
    OUT_OF_MEMORY,
    DriverError,
    ProcessState,
    check_version,
)
from relume.gpu.processes import CudaProcess, Range, added, anonymous_memory, state_of, take_census

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. A copy's time is set by the PCIe bus: 10 GB/s and slower, plus pinning the memory."""

    lock_s: float = 30.0
    """For submitted work to finish, for each process."""
    checkpoint_s: float = 300.0
    restore_s: float = 300.0
    attempts: int = 3
    """Of a restore or unlock, before a process counts as lost."""
    pause_s: float = 1.0
    """Between two attempts; doubled each time."""
    room_s: float = 30.0
    """For the GPU to have as much memory free as the processes need."""


@dataclass(frozen=True, slots=True)
class SuspendedProcess:
    """One process whose device memory now lies in its host memory, at ``ranges``.

    ``inside`` is its pid in the container, the one CRIU's images use; a copy has it at the same addresses.
    """

    pid: int
    inside: int
    name: str
    device_bytes: int | None
    gpus: tuple[str, ...]
    ranges: tuple[Range, ...]
    lock_s: float
    checkpoint_s: float

    @property
    def host_bytes(self) -> int:
        return sum(part.size for part in self.ranges)


@dataclass(frozen=True, slots=True)
class Suspended:
    """What ``suspend`` did. Empty ``processes``: no CUDA context, nothing to resume.

    ``gpus`` are the UUIDs of the GPUs the contexts were on; a restore must map each of them.
    """

    processes: tuple[SuspendedProcess, ...] = ()
    seconds: float = 0.0

    @property
    def gpus(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(gpu for process in self.processes for gpu in process.gpus))

    @property
    def needs(self) -> dict[str, int]:
        """Bytes by GPU that a restore will take, as far as NVML told; of processes on one GPU."""
        return needed((process.gpus, process.device_bytes) for process in self.processes)

    @property
    def host_bytes(self) -> int:
        """Memory that the checkpoint gained by it, in bytes."""
        return sum(process.host_bytes for process in self.processes)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and the trace."""
        copy_s = sum(process.checkpoint_s for process in self.processes)
        return {
            "processes": [asdict(process) for process in self.processes],
            "gpus": list(self.gpus),
            "host_bytes": self.host_bytes,
            "bytes_per_s": int(self.host_bytes / copy_s) if copy_s else 0,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Resumed:
    """How long it took to bring ``pids`` back: the copy, and all of it; seconds."""

    pids: tuple[int, ...] = ()
    restore_s: float = 0.0
    seconds: float = 0.0


@dataclass(slots=True)
class GpuCheckpointer:
    """The three stories over one driver. Keeps no state: what a process is in, the driver is asked for."""

    driver: AsyncGpuDriver
    limits: Limits = field(default_factory=Limits)

    async def suspend(self, pids: Iterable[int]) -> Suspended:
        """Move the device memory of those of ``pids`` that hold a CUDA context into their host memory.

        Raises GpuTimeout (work that does not end), GpuUnsupported, GpuUnavailable, GpuDriverTooOld or GpuError with all
        processes running again, or GpuLost.
        """
        started = time.monotonic()
        census = await take_census(self.driver, pids)
        if not census.cuda:
            return Suspended()
        if census.machine.driver_version:  # else NVML is missing, and the library has the functions
            check_version(census.machine.driver_version)
        busy = [process for process in census.cuda if process.state is not ProcessState.RUNNING]
        if busy:
            # Left over from a node that died between the two calls. Bring it back first, then go on.
            await self.recover([process.pid for process in busy])
            census = await take_census(self.driver, [process.pid for process in census.cuda])
        try:
            lock_s = {process.pid: await self._lock(process) for process in census.cuda}
            done = [await self._checkpoint(process, lock_s[process.pid]) for process in census.cuda]
        except BaseException as error:
            await _finish(self._undo([process.pid for process in census.cuda], error))
            if isinstance(error, DriverError):
                raise _explain(error, census.cuda) from error
            raise
        return Suspended(tuple(done), time.monotonic() - started)

    async def resume(self, suspended: Suspended) -> Resumed:
        """Give the original its GPUs back; a cancellation waits until that is done. Raises GpuLost."""
        return await _finish(self._resume(suspended))

    async def _resume(self, suspended: Suspended) -> Resumed:
        await self._until_room(suspended.needs)
        return await self._bring_back([process.pid for process in suspended.processes], {})

    async def _until_room(self, needs: Mapping[str, int]) -> None:
        """Return when the GPUs have ``needs`` free (UUID -> bytes), or after a while all the same."""
        deadline = time.monotonic() + self.limits.room_s
        while time.monotonic() < deadline:
            try:
                free = {gpu.uuid: gpu.free_bytes for gpu in (await self.driver.survey()).gpus}
            except RelumeError:
                return  # the driver's own answer will do
            if all(free.get(uuid, size) >= size for uuid, size in needs.items()):
                return
            await asyncio.sleep(0.2)

    async def restore(
        self,
        pids: Iterable[int],
        gpu_map: Mapping[str, str],
        *,
        expected: int,
        needs: Mapping[str, int] | None = None,
    ) -> Resumed:
        """Give a copy that CRIU revived the GPUs of ``gpu_map`` (old UUID -> new UUID, every saved GPU).

        ``needs`` are the bytes that were in use on each old one (``needed``).
        ``expected`` is the number of processes that were suspended at the checkpoint. The copy must be running, not
        stopped: the driver works through a thread inside it. Raises GpuLost and GpuDriverTooOld; either way the
        copy is of no use.
        """
        if any(old != new for old, new in gpu_map.items()):
            check_version((await self.driver.survey()).driver_version, remap=True)
        states = {pid: await state_of(self.driver, pid) for pid in pids}
        waiting = [
            pid for pid, state in states.items() if state in (ProcessState.CHECKPOINTED, ProcessState.LOCKED)
        ]
        if len(waiting) != expected:
            words = [
                f"{pid}: {state.name if state is not None else 'no CUDA'}" for pid, state in states.items()
            ]
            raise GpuLost(
                f"{expected} processes had GPU memory in the checkpoint, {len(waiting)} of the copy have "
                f"(the driver says of {', '.join(words[:8]) or 'no process'})",
                hint="is CRIU's own CUDA plugin active? relume switches it off by an empty libdir",
                lost=[],
            )
        await self._until_room({gpu_map.get(uuid, uuid): size for uuid, size in (needs or {}).items()})
        return await self._bring_back(waiting, gpu_map)

    async def recover(self, pids: Iterable[int]) -> Resumed:
        """Bring back whatever of ``pids`` is locked or suspended: for a node that died in between. Raises GpuLost."""
        return await self._bring_back(
            [pid for pid in pids if await state_of(self.driver, pid) is not None], {}
        )

    async def _lock(self, process: CudaProcess) -> float:
        started = time.monotonic()
        await self.driver.lock(process.pid, self.limits.lock_s)
        return time.monotonic() - started

    async def _checkpoint(self, process: CudaProcess, lock_s: float) -> SuspendedProcess:
        before = anonymous_memory(process.pid)
        started = time.monotonic()
        await self.driver.checkpoint(process.pid, self.limits.checkpoint_s)
        return SuspendedProcess(
            pid=process.pid,
            inside=process.traces.inside,
            name=process.name,
            device_bytes=process.device_bytes,
            gpus=process.gpus,
            ranges=added(before, anonymous_memory(process.pid)),
            lock_s=lock_s,
            checkpoint_s=time.monotonic() - started,
        )

    async def _undo(self, pids: Sequence[int], cause: BaseException) -> None:
        try:
            await self._bring_back(pids, {})
        except GpuLost as lost:
            raise GpuLost(f"{lost.message} (after: {cause})", hint=lost.hint, **lost.details) from cause

    async def _bring_back(self, pids: Sequence[int], gpu_map: Mapping[str, str]) -> Resumed:
        """Restore all that are checkpointed, then unlock all that are locked; each with its retries.

        Nobody is unlocked before everybody is restored: a process must not wait on a peer that is not there.
        """
        started = time.monotonic()
        failures = await self._for_each(pids, lambda pid: self._restored(pid, gpu_map))
        restore_s = time.monotonic() - started
        failures |= await self._for_each([pid for pid in pids if pid not in failures], self._unlocked)
        if failures:
            raise GpuLost(
                f"the CUDA driver cannot bring back {len(failures)} of {len(pids)} processes: "
                + "; ".join(str(failure) for failure in failures.values()),
                hint="the instance has to be started anew; the kernel log and `nvidia-smi -q` may say why",
                lost=[{"pid": pid, "reason": str(failure)} for pid, failure in failures.items()],
            )
        return Resumed(tuple(pids), restore_s, time.monotonic() - started)

    async def _for_each(
        self, pids: Sequence[int], step: Callable[[int], Awaitable[RelumeError | None]]
    ) -> dict[int, RelumeError]:
        answers = await asyncio.gather(*(step(pid) for pid in pids))
        return {pid: failure for pid, failure in zip(pids, answers, strict=True) if failure is not None}

    async def _restored(self, pid: int, gpu_map: Mapping[str, str]) -> RelumeError | None:
        async def step(state: ProcessState) -> None:
            if state is ProcessState.CHECKPOINTED:
                await self.driver.restore(pid, gpu_map, self.limits.restore_s)

        return await self._until(pid, (ProcessState.LOCKED, ProcessState.RUNNING), step)

    async def _unlocked(self, pid: int) -> RelumeError | None:
        async def step(state: ProcessState) -> None:
            if state is ProcessState.LOCKED:
                await self.driver.unlock(pid)

        return await self._until(pid, (ProcessState.RUNNING,), step)

    async def _until(
        self, pid: int, wanted: tuple[ProcessState, ...], step: Callable[[ProcessState], Awaitable[None]]
    ) -> RelumeError | None:
        """Look, act, look again, until the driver says ``wanted``; None then, or the last failure."""
        failure: RelumeError = GpuError(f"process {pid} did not get to {wanted[-1].name}")
        pause_s = self.limits.pause_s
        for attempt in range(self.limits.attempts):
            if attempt:
                await asyncio.sleep(pause_s)
                pause_s *= 2
            try:
                state = await state_of(self.driver, pid)
                if state is ProcessState.FAILED:
                    return GpuError(f"process {pid} is in state FAILED")
                if state is not None and state not in wanted:
                    await step(state)
                    state = await state_of(self.driver, pid)
            except RelumeError as error:
                failure = error
                continue
            if state is None or state in wanted:
                return None  # no state: it ended meanwhile, which is its own affair and not a stuck process
        return failure


def needed(processes: Iterable[tuple[Sequence[str], int | None]]) -> dict[str, int]:
    """Bytes by GPU of processes, each given by its GPUs and its bytes on them; of those on exactly one GPU."""
    needs: dict[str, int] = {}
    for gpus, size in processes:
        if len(gpus) == 1 and size:
            needs[gpus[0]] = needs.get(gpus[0], 0) + size
    return needs


async def _finish(work: Awaitable[T]) -> T:
    """Let ``work`` come to its end even if we are cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


def _explain(error: DriverError, processes: Sequence[CudaProcess]) -> GpuError:
    """The driver's error in words. The app goes on: what was done is undone."""
    name = next((process.name for process in processes if process.pid == error.pid), "")
    who = f"process {error.pid} ({name})"
    if error.result in NO_CONTEXT:
        return GpuError(f"{who} ended in the middle: {error}", hint="ask again", pid=error.pid)
    if error.result == NOT_READY:
        return GpuTimeout(
            f"{who} still had work on the GPU when the lock's time was over",
            hint="ask for the checkpoint when the GPU is idle, after torch.cuda.synchronize(); a kernel that never "
            "ends, or NCCL waiting for a peer, cannot be saved",
            pid=error.pid,
        )
    if error.result == OUT_OF_MEMORY:
        return GpuError(
            f"the driver had no memory to put {who} away: {error}",
            hint="free caches before the request (torch.cuda.empty_cache(), vLLM sleep) or raise the memory limit",
            pid=error.pid,
        )
    return GpuUnsupported(
        f"the driver cannot save {who}: {error}",
        hint="managed memory, CUDA IPC, NCCL, MIG and MPS are the usual reasons: docs/gpu.md",
        pid=error.pid,
        cuda_error=error.name,
    )
