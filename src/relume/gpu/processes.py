"""Which processes of an instance hold a CUDA context, and what in them the driver cannot save.

/proc says who could (a mapping of libcuda or of an NVIDIA device, an open device), NVML says who holds how much
memory where, and the driver has the last word: a process has CUDA if it has a restore thread, which cuInit starts
(the question that CRIU's plugin asks too; the state answers RUNNING also for launchers without CUDA, as NVIDIA's
ai-dynamo/snapshot found). A process that ends meanwhile is left out.

From outside, some things show only by their traces: managed memory is mapped from /dev/nvidia-uvm at its own
address (seen in google/gvisor #10331), NCCL and legacy CUDA IPC keep files in /dev/shm. Where there is no trace
the driver refuses at the call, and ``story`` brings the app back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from relume.gpu.client import AsyncGpuDriver
from relume.gpu.driver import NOT_CUDA, DriverError, ProcessState
from relume.gpu.nvml import Machine
from relume.linux import proc

_DEVICE: Final = re.compile(r"/dev/nvidia(ctl|-uvm|-uvm-tools|\d+|-caps/.*)$")
_LIBRARY: Final = re.compile(r"/libcuda\.so[^/]*$")
_UVM: Final = "/dev/nvidia-uvm"
_NCCL: Final = re.compile(r"/nccl-[^/]*$")
_IPC: Final = re.compile(r"/cuda\.shm\.[^/]*$")
_ANONYMOUS: Final = re.compile(r"$|\[heap\]|\[anon|/dev/zero \(deleted\)|/memfd:|/anon_hugepage")
"""Beginnings of the names of mappings without a file of anybody's."""
_IDLE: Final = 1 << 30
"""Bytes in use on a GPU that nobody works on, at most: the driver's own."""


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses [start, end) of a process."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Traces:
    """What /proc shows of one process. ``inside`` is its pid in its own namespace, ``devices`` are the NVIDIA
    devices it has open."""

    pid: int
    inside: int
    name: str
    library: bool
    devices: tuple[str, ...]
    uvm_bytes: int
    nccl: bool
    ipc: bool
    stopped: bool

    @property
    def any(self) -> bool:
        return self.library or bool(self.devices)


@dataclass(frozen=True, slots=True)
class CudaProcess:
    """A process with a CUDA context. ``device_bytes`` is None where NVML cannot say."""

    pid: int
    name: str
    state: ProcessState
    device_bytes: int | None
    gpus: tuple[str, ...]
    mps: bool
    traces: Traces


@dataclass(frozen=True, slots=True)
class Census:
    """The CUDA processes among those asked for, and the ones that hold a device without a context: NVML users, or
    children forked after CUDA was initialised. CRIU cannot save the latter's devices (CRIU plugins/cuda/README)."""

    cuda: tuple[CudaProcess, ...]
    strays: tuple[Traces, ...]
    machine: Machine


async def take_census(driver: AsyncGpuDriver, pids: Iterable[int]) -> Census:
    """Look at each of ``pids`` (host pids, any order). Raises what the driver's calls raise."""
    machine = await driver.survey()
    held = {holder.pid for holder in machine.holders}
    told = _names_processes(machine)
    cuda: list[CudaProcess] = []
    strays: list[Traces] = []
    for pid in sorted(set(pids)):
        traces = look(pid)
        if traces is None or not (traces.any or pid in held):
            continue
        state = await state_of(driver, pid) if await _has_cuda(driver, pid) else None
        if state is not None:
            cuda.append(_cuda_process(pid, state, traces, machine, told))
        elif traces.devices:
            strays.append(traces)
    return Census(tuple(cuda), tuple(strays), machine)


async def state_of(driver: AsyncGpuDriver, pid: int) -> ProcessState | None:
    """The driver's state of a process; None if it has no CUDA context (or is gone)."""
    try:
        return await driver.state(pid)
    except DriverError as error:
        if error.result in NOT_CUDA:
            return None
        raise


async def _has_cuda(driver: AsyncGpuDriver, pid: int) -> bool:
    try:
        await driver.restore_thread_id(pid)
    except DriverError as error:
        if error.result in NOT_CUDA:
            return False
        raise
    return True


def _names_processes(machine: Machine) -> bool:
    """Whether NVML's list of processes can be read here: not where it has none although memory is in use, nor where
    its pids are of another namespace (then the node runs in a container)."""
    if not machine.holders:
        return all(gpu.used_bytes < _IDLE for gpu in machine.gpus)
    return all(proc.exists(holder.pid) for holder in machine.holders)


def look(pid: int) -> Traces | None:
    """The NVIDIA traces in /proc/PID; None if it is gone."""
    library = nccl = ipc = False
    uvm_bytes = 0
    devices: set[str] = set()
    try:
        for mapping in proc.mappings(pid):
            path = mapping.path.removesuffix(proc.DELETED)
            library |= _LIBRARY.search(path) is not None
            nccl |= _NCCL.search(path) is not None
            ipc |= _IPC.search(path) is not None
            if path == _UVM:
                uvm_bytes += mapping.end - mapping.start
        devices.update(target for _fd, target in proc.descriptors(pid) if _DEVICE.match(target))
        status = proc.status(pid)
    except proc.GONE:
        return None
    return Traces(
        pid=pid,
        inside=status.inside,
        name=status.name,
        library=library,
        devices=tuple(sorted(devices)),
        uvm_bytes=uvm_bytes,
        nccl=nccl,
        ipc=ipc,
        stopped=status.state in "Tt",
    )


def anonymous_memory(pid: int) -> tuple[Range, ...]:
    """Writable memory without a file, private or shared, neighbours merged; empty if the process is gone.

    Where the driver puts device memory is its own affair: what the host's side of CUDA gets by cudaMallocHost is
    shared anonymous memory (ai-dynamo/dynamo #9124), which CRIU restores before the process runs.
    """
    merged: list[Range] = []
    try:
        for mapping in proc.mappings(pid):
            if "w" not in mapping.permissions or not _ANONYMOUS.match(mapping.path):
                continue
            if merged and merged[-1].end == mapping.start:
                merged[-1] = Range(merged[-1].start, mapping.end)
            else:
                merged.append(Range(mapping.start, mapping.end))
    except proc.GONE:
        return ()
    return tuple(merged)


def added(before: Iterable[Range], after: Iterable[Range]) -> tuple[Range, ...]:
    """The parts of ``after`` that ``before`` does not cover. Both in address order."""
    result: list[Range] = []
    old = list(before)
    for new in after:
        start = new.start
        for gap in old:
            if gap.end <= start or gap.start >= new.end:
                continue
            if gap.start > start:
                result.append(Range(start, gap.start))
            start = max(start, gap.end)
        if start < new.end:
            result.append(Range(start, new.end))
    return tuple(result)


def _cuda_process(pid: int, state: ProcessState, traces: Traces, machine: Machine, told: bool) -> CudaProcess:
    held = [holder for holder in machine.holders if holder.pid == pid]
    sizes = [holder.used_bytes for holder in held]
    # No entry is no memory: the driver has put it away, or there was cuInit and no context yet.
    unknown = None in sizes or (not held and not told and state is ProcessState.RUNNING)
    return CudaProcess(
        pid=pid,
        name=traces.name,
        state=state,
        device_bytes=None if unknown else sum(size for size in sizes if size is not None),
        gpus=tuple(dict.fromkeys(holder.gpu_uuid for holder in held)),
        mps=any(holder.mps for holder in held),
        traces=traces,
    )
