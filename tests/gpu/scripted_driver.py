"""An AsyncGpuDriver in memory that follows a script of mishaps: for sequences that no real part produces on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from relume.errors import GpuTimeout, GpuUnavailable
from relume.gpu.driver import DriverError, ProcessState
from relume.gpu.nvml import Gpu, Holder, Machine

GPU = Gpu(
    0, "GPU-00000001-1111-2222-3333-444444444444", "NVIDIA L4", 24 << 30, 1 << 30, mig=False, persistence=True
)

_NEXT = {
    "lock": (ProcessState.RUNNING, ProcessState.LOCKED),
    "checkpoint": (ProcessState.LOCKED, ProcessState.CHECKPOINTED),
    "restore": (ProcessState.CHECKPOINTED, ProcessState.LOCKED),
    "unlock": (ProcessState.LOCKED, ProcessState.RUNNING),
}


class Mishap(Enum):
    NONE = "the call works"
    REFUSED = "an error, nothing done"
    REFUSED_AFTER = "an error, and yet it is done"
    STUCK = "no answer in time, nothing done"
    STUCK_AFTER = "no answer in time, and yet it is done"
    DEAD = "the helper dies, nothing done"
    DEAD_AFTER = "the helper dies after the work"
    FAILED = "an error that leaves the process in state FAILED"
    GONE = "the process ends"


@dataclass
class ScriptedDriver:
    """``script`` is consumed one mishap a call, those that ask for a state included; then everything works."""

    pids: Iterable[int]
    script: list[Mishap] = field(default_factory=list)
    refuse_for_ever: frozenset[str] = frozenset()
    calls: list[tuple[str, int]] = field(default_factory=list)
    illegal: list[tuple[str, int, ProcessState]] = field(default_factory=list)
    maps: list[Mapping[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.states: dict[int, ProcessState] = dict.fromkeys(self.pids, ProcessState.RUNNING)

    async def survey(self) -> Machine:
        # All of them, so that the story asks for their state: these processes have no libcuda mapped.
        holders = tuple(Holder(pid, GPU.uuid, 1 << 20, mps=False) for pid in self.states)
        return Machine((GPU,), holders, "570.86.10", 12080)

    async def state(self, pid: int) -> ProcessState:
        await asyncio.sleep(0)
        mishap = self._next()
        if mishap in (Mishap.REFUSED, Mishap.REFUSED_AFTER, Mishap.FAILED):
            raise DriverError("state", 999, "CUDA_ERROR_UNKNOWN", pid)
        self._raise_if_silent(mishap, "state", pid)
        if pid not in self.states:
            raise DriverError("state", 1, "CUDA_ERROR_INVALID_VALUE", pid)
        return self.states[pid]

    async def restore_thread_id(self, pid: int) -> int:
        await asyncio.sleep(0)
        if pid not in self.states:
            raise DriverError("restore_thread_id", 3, "CUDA_ERROR_NOT_INITIALIZED", pid)
        return pid

    async def lock(self, pid: int, timeout_s: float) -> None:
        await self._step("lock", pid)

    async def checkpoint(self, pid: int, timeout_s: float) -> None:
        await self._step("checkpoint", pid)

    async def restore(self, pid: int, gpu_map: Mapping[str, str], timeout_s: float) -> None:
        self.maps.append(gpu_map)
        await self._step("restore", pid)

    async def unlock(self, pid: int) -> None:
        await self._step("unlock", pid)

    async def _step(self, call: str, pid: int) -> None:
        self.calls.append((call, pid))
        await asyncio.sleep(0)
        mishap = Mishap.REFUSED if call in self.refuse_for_ever else self._next()
        if mishap is Mishap.GONE:
            self.states.pop(pid, None)
        if pid not in self.states:
            raise DriverError(call, 1, "CUDA_ERROR_INVALID_VALUE", pid)
        needed, reached = _NEXT[call]
        if self.states[pid] is not needed:
            self.illegal.append((call, pid, self.states[pid]))
            raise DriverError(call, 401, "CUDA_ERROR_ILLEGAL_STATE", pid)
        if mishap in (Mishap.NONE, Mishap.REFUSED_AFTER, Mishap.STUCK_AFTER, Mishap.DEAD_AFTER):
            self.states[pid] = reached
        if mishap is Mishap.FAILED:
            self.states[pid] = ProcessState.FAILED
        if mishap in (Mishap.REFUSED, Mishap.REFUSED_AFTER, Mishap.FAILED):
            raise DriverError(call, 999, "CUDA_ERROR_UNKNOWN", pid)
        self._raise_if_silent(mishap, call, pid)

    def _next(self) -> Mishap:
        return self.script.pop(0) if self.script else Mishap.NONE

    def _raise_if_silent(self, mishap: Mishap, call: str, pid: int) -> None:
        if mishap in (Mishap.STUCK, Mishap.STUCK_AFTER):
            raise GpuTimeout(f"no answer to {call} for {pid}")
        if mishap in (Mishap.DEAD, Mishap.DEAD_AFTER):
            raise GpuUnavailable(f"the helper died in {call} for {pid}")
