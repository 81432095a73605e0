"""What must be refused before anything is locked: things the driver cannot save, and memory that will not fit.

cuda-checkpoint's README says of an error such as managed memory in the middle of a checkpoint that the driver "does not
attempt to keep the process in a good state". So whatever shows from outside is refused here, by name, while the app
still runs. What does not show is met by ``story``. Each refusal says where upstream speaks about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from relume.errors import GpuMemory, GpuUnsupported
from relume.gpu.client import AsyncGpuDriver
from relume.gpu.driver import ProcessState, check_version
from relume.gpu.processes import Census, take_census

UVM_TOLERATED: Final = 64 << 20
"""Bytes of /dev/nvidia-uvm mappings that every context may have without managed memory: the driver maps its
semaphore pools from there too. A guess on the safe side of 2 MB pools: a torch server on an H100 stays below it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory at the moment of the checkpoint, in bytes. ``pids`` hold a CUDA context; empty: no GPU work to do."""

    pids: tuple[int, ...]
    host_bytes: int
    device_bytes: int
    limit: int | None

    @property
    def needed(self) -> int:
        return self.host_bytes + self.device_bytes


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that stands in the way: its name for programs, what and where, and what to do."""

    name: str
    what: str
    hint: str
    pid: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "what": self.what, "hint": self.hint, "pid": self.pid}


async def preflight(
    driver: AsyncGpuDriver,
    pids: Iterable[int],
    *,
    memory_limit: int | None,
    host_bytes: int,
    available_bytes: int | None = None,
    max_gpus: int = 1,
) -> Budget:
    """Measure and judge the instance's ``pids``; nothing is changed in them.

    ``memory_limit`` is the container's (None: none), ``host_bytes`` what it uses now, ``available_bytes`` what the
    machine has left (None: do not look). Raises GpuUnsupported with ``obstacles``, GpuMemory with the
    numbers, GpuDriverTooOld, and what the driver's calls raise.
    """
    census = await take_census(driver, pids)
    return judge(
        census,
        memory_limit=memory_limit,
        host_bytes=host_bytes,
        available_bytes=available_bytes,
        max_gpus=max_gpus,
    )


def judge(
    census: Census, *, memory_limit: int | None, host_bytes: int, available_bytes: int | None, max_gpus: int
) -> Budget:
    """``preflight`` on a census already taken."""
    if census.cuda:
        check_version(census.machine.driver_version)
    obstacles = [*_process_obstacles(census), *_instance_obstacles(census, max_gpus)]
    if obstacles:
        raise GpuUnsupported(
            "; ".join(obstacle.what for obstacle in obstacles),
            hint=obstacles[0].hint,
            obstacles=[obstacle.as_dict() for obstacle in obstacles],
        )
    budget = Budget(
        pids=tuple(process.pid for process in census.cuda),
        host_bytes=host_bytes,
        device_bytes=_device_bytes(census),
        limit=memory_limit,
    )
    for room, whose in (
        (memory_limit, "the container's limit"),
        (_plus(available_bytes, host_bytes), "this machine"),
    ):
        if room is not None and budget.device_bytes and budget.needed > room:
            raise GpuMemory(
                f"{_gib(budget.host_bytes)} in use and {_gib(budget.device_bytes)} on the GPU do not fit "
                f"{whose} of {_gib(room)}",
                hint="drop caches before the request (vLLM: sleep; torch: torch.cuda.empty_cache()), or raise "
                f"[cerebrium.hardware] memory to {-(-budget.needed // 2**30) + 1} or more",
                host_bytes=budget.host_bytes,
                device_bytes=budget.device_bytes,
                limit_bytes=room,
            )
    return budget


def _process_obstacles(census: Census) -> Iterator[Obstacle]:
    for process in census.cuda:
        who = f"process {process.pid} ({process.name})"
        if process.state is ProcessState.FAILED:
            yield Obstacle("failed", f"{who} is in state FAILED", "restart the instance", process.pid)
        if process.traces.stopped:
            hint = "let it run (SIGCONT): the driver works through a thread inside the process"
            yield Obstacle("stopped", f"{who} is stopped", hint, process.pid)
        if process.mps:
            hint = "run the app without MPS (CRIU plugins/cuda/README: not supported)"
            yield Obstacle("mps", f"{who} runs under the Multi-Process Service", hint, process.pid)
        if process.traces.uvm_bytes > UVM_TOLERATED:
            what = f"{who} has {_gib(process.traces.uvm_bytes)} of managed memory mapped"
            hint = "use device memory instead of cudaMallocManaged (cuda-checkpoint README: UVM is not supported)"
            yield Obstacle("uvm", what, hint, process.pid)
        if process.traces.nccl:
            hint = "destroy the process group before the request (cuda-checkpoint #30: NCCL is not supported)"
            yield Obstacle("nccl", f"{who} talks to peers by NCCL", hint, process.pid)
        if process.traces.ipc:
            hint = (
                "close IPC handles before the request; from driver 610 on it works for processes started by "
            )
            hint += "`cuda-checkpoint --launch-job` (cuda-checkpoint #56), which relume does not do"
            yield Obstacle("ipc", f"{who} shares device memory by CUDA IPC", hint, process.pid)
    for stray in census.strays:
        what = f"process {stray.pid} ({stray.name}) holds {', '.join(stray.devices)} without a CUDA context"
        hint = "shut NVML down in it, or start it by exec instead of fork (CRIU plugins/cuda/README); torch.compile's "
        hint += "workers are such processes: TORCHINDUCTOR_COMPILE_THREADS=1 goes without them"
        yield Obstacle("device", what, hint, stray.pid)


def _instance_obstacles(census: Census, max_gpus: int) -> Iterator[Obstacle]:
    used = {uuid for process in census.cuda for uuid in process.gpus}
    for gpu in census.machine.gpus:
        if gpu.mig and census.cuda and (gpu.uuid in used or not used):
            hint = "use a GPU with MIG off (cuda-checkpoint #42: MIG is not supported)"
            yield Obstacle("mig", f"GPU {gpu.index} ({gpu.model}) is in MIG mode", hint)
    if len(used) > max_gpus:
        hint = "use gpu_count = 1: restores across GPUs fail upstream (cuda-checkpoint #27, #47)"
        yield Obstacle(
            "gpus", f"the instance uses {len(used)} GPUs; checkpoints are limited to {max_gpus}", hint
        )


def _device_bytes(census: Census) -> int:
    known = sum(process.device_bytes or 0 for process in census.cuda)
    silent = [process for process in census.cuda if process.device_bytes is None]
    if not silent:
        return known
    # NVML will not say for these; together they can have no more than is in use on their GPUs and nobody's else.
    names = {uuid for process in silent for uuid in process.gpus}
    gpus = [gpu for gpu in census.machine.gpus if gpu.uuid in names or not names]
    used = sum(gpu.used_bytes for gpu in gpus)
    others = sum(
        holder.used_bytes or 0
        for holder in census.machine.holders
        if holder.gpu_uuid in {gpu.uuid for gpu in gpus}
    )
    return known + max(0, used - others)


def _plus(available: int | None, used: int) -> int | None:
    return None if available is None else available + used


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
