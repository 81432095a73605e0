"""What NVML knows: the machine's GPUs, and which processes hold memory on them.

A machine without NVML, without a driver or without a device is a machine with no GPU: ``survey`` then returns an
empty Machine and says why. NVML calls block (tens of milliseconds; seconds while a driver loads), so they are made in
the helper process. The pids are those of the NVML caller's pid namespace, the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pynvml


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. ``uuid`` is NVML's text form; sizes in bytes."""

    index: int
    uuid: str
    model: str
    memory_bytes: int
    used_bytes: int
    mig: bool
    persistence: bool

    @property
    def free_bytes(self) -> int:
        return self.memory_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with a context on a GPU. ``used_bytes`` is None where NVML cannot say (MIG, some virtual GPUs)."""

    pid: int
    gpu_uuid: str
    used_bytes: int | None
    mps: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs of this machine. ``reason`` says why ``gpus`` is empty, "" where it is not."""

    gpus: tuple[Gpu, ...] = ()
    holders: tuple[Holder, ...] = ()
    driver_version: str = ""
    cuda_version: int = 0
    """What the driver supports at most, as 1000 * major + 10 * minor."""
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        return cls(
            gpus=tuple(Gpu(**gpu) for gpu in data["gpus"]),
            holders=tuple(Holder(**holder) for holder in data["holders"]),
            driver_version=data["driver_version"],
            cuda_version=data["cuda_version"],
            reason=data["reason"],
        )


def survey() -> Machine:
    """Ask NVML. Never raises for a missing library, driver or device."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Machine(reason=f"NVML: {error}")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = tuple(_gpu(index, handle) for index, handle in enumerate(handles))
        return Machine(
            gpus=gpus,
            holders=tuple(
                holder for gpu, handle in zip(gpus, handles, strict=True) for holder in _holders(gpu, handle)
            ),
            driver_version=_text(pynvml.nvmlSystemGetDriverVersion()),
            cuda_version=int(_optional(pynvml.nvmlSystemGetCudaDriverVersion, default=0)),
            reason="" if gpus else "NVML finds no device",
        )
    except pynvml.NVMLError as error:
        return Machine(reason=f"NVML: {error}")
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    mig, _pending = _optional(pynvml.nvmlDeviceGetMigMode, handle, default=(0, 0))
    return Gpu(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        model=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(memory.total),
        used_bytes=int(memory.used),
        mig=mig == 1,
        persistence=_optional(pynvml.nvmlDeviceGetPersistenceMode, handle, default=0) == 1,
    )


def _holders(gpu: Gpu, handle: Any) -> list[Holder]:
    by_mps = {
        process.pid
        for process in _optional(pynvml.nvmlDeviceGetMPSComputeRunningProcesses, handle, default=[])
    }
    found = _optional(pynvml.nvmlDeviceGetComputeRunningProcesses, handle, default=[])
    return [
        Holder(
            pid=int(process.pid),
            gpu_uuid=gpu.uuid,
            used_bytes=None if process.usedGpuMemory is None else int(process.usedGpuMemory),
            mps=process.pid in by_mps,
        )
        for process in found
    ]


def _optional(function: Callable[..., Any], *args: Any, default: Any) -> Any:
    """A query that some devices and driver versions do not answer."""
    try:
        return function(*args)
    except (
        pynvml.NVMLError_NotSupported,
        pynvml.NVMLError_FunctionNotFound,
        pynvml.NVMLLibraryMismatchError,
    ):
        return default


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
