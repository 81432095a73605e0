"""The CUDA driver's process checkpoint functions, by ctypes on libcuda.so.1.

Names, structs and states follow the CUDA driver API reference, section "CUDA Checkpointing" (CUDA 12.8 brought
the six functions with driver 570, CUDA 13.0 the GPU pairs of the restore call with driver 580). Every argument
struct is 64 bytes, and what a version does not know of it must be zero.

All calls block, some for as long as the copy of the device memory takes, and they block for ever where the
driver waits for a process that does not answer. They belong into the helper process (``helper``), never into
the event loop. Nothing here retries or cleans up; the order of calls is ``story``'s.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Protocol

from relume.errors import GpuDriverTooOld, GpuError, GpuUnavailable

LIBRARY: Final = "libcuda.so.1"
MIN_DRIVER: Final = 570
"""First driver branch with the checkpoint functions (cuda-checkpoint README, "570 Features")."""
MIN_DRIVER_REMAP: Final = 580
"""First branch whose restore takes GPU pairs: ``CUcheckpointGpuPair`` came with the CUDA 13.0 headers."""

FUNCTIONS: Final = (
    "cuCheckpointProcessGetState",
    "cuCheckpointProcessGetRestoreThreadId",
    "cuCheckpointProcessLock",
    "cuCheckpointProcessCheckpoint",
    "cuCheckpointProcessRestore",
    "cuCheckpointProcessUnlock",
)

OUT_OF_MEMORY: Final = 2
NOT_READY: Final = 600
"""What Lock returns when its time-out passed; the process is left running."""
NO_CONTEXT: Final = frozenset({1, 3, 201})
"""INVALID_VALUE, NOT_INITIALIZED, INVALID_CONTEXT: the answers about a process that never made a context."""
NOT_CUDA: Final = NO_CONTEXT | {304, 801}
"""What the two questions (state, restore thread) answer of a process without CUDA: those, and OPERATING_SYSTEM and
NOT_SUPPORTED (cuda-checkpoint #37; the reference names the latter for both)."""


class ProcessState(IntEnum):
    """``CUprocessState``. The last two belong to custom storage (CUDA 13.4), which we do not ask for."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


class DriverError(GpuError):
    """A driver function answered something other than CUDA_SUCCESS: ``result`` is the CUresult, ``name`` its name."""

    def __init__(self, call: str, result: int, name: str, pid: int = 0) -> None:
        about = f" for process {pid}" if pid else ""
        super().__init__(
            f"{call}{about}: {name} ({result})", hint="docs/gpu.md says what the driver cannot do"
        )
        self.call = call
        self.result = result
        self.name = name
        self.pid = pid


class GpuDriver(Protocol):
    """What the helper needs of a driver. All methods block; all but ``cuda_version`` raise DriverError."""

    def cuda_version(self) -> int:
        """The CUDA version of libcuda, as 1000 * major + 10 * minor (12.8 is 12080)."""

    def state(self, pid: int) -> ProcessState: ...

    def restore_thread_id(self, pid: int) -> int: ...

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Block the process's CUDA calls and wait for submitted work; 0 waits without limit."""

    def checkpoint(self, pid: int) -> None:
        """Copy device memory into the process's host memory and let go of the GPUs."""

    def restore(self, pid: int, gpu_map: Mapping[str, str]) -> None:
        """Take GPUs again and copy back. ``gpu_map``: old UUID -> new UUID, for all GPUs or none."""

    def unlock(self, pid: int) -> None: ...


class _LockArgs(ctypes.Structure):
    _fields_ = (
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class _GpuPair(ctypes.Structure):
    _fields_ = (("old", _Uuid), ("new", _Uuid))


class _RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("pairs", ctypes.POINTER(_GpuPair)),
        ("count", ctypes.c_uint),
        # Rest of the 64 bytes: padding, and since 13.4 the custom storage pointer, NULL for "from host memory".
        ("reserved", ctypes.c_char * 52),
    )


@dataclass(frozen=True, slots=True)
class CudaDriver:
    """The real library (or whatever the dynamic loader finds under its name)."""

    _library: ctypes.CDLL

    @classmethod
    def load(cls, name: str = LIBRARY) -> CudaDriver:
        """Load libcuda and call cuInit, which restore requires where persistence mode is off.

        Takes seconds on a machine with several GPUs. Raises GpuUnavailable where the library is missing or finds
        no device, GpuDriverTooOld where it lacks one of the six functions.
        """
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise GpuUnavailable(
                f"{name} cannot be loaded: {error}",
                hint="install the NVIDIA driver's CUDA library (package libcuda1 or libnvidia-compute-NNN)",
            ) from error
        missing = [function for function in FUNCTIONS if not hasattr(library, function)]
        if missing:
            raise GpuDriverTooOld(
                f"{name} lacks {', '.join(missing)}",
                hint=f"install NVIDIA driver {MIN_DRIVER} or newer",
                missing=missing,
            )
        driver = cls(library)
        try:
            driver._check("cuInit", library.cuInit(ctypes.c_uint(0)))
        except DriverError as error:
            raise GpuUnavailable(
                f"the CUDA driver does not start: {error}",
                hint="`nvidia-smi` says whether the kernel module and the devices are there",
                cuda_error=error.name,
            ) from error
        return driver

    def cuda_version(self) -> int:
        version = ctypes.c_int(0)
        self._check("cuDriverGetVersion", self._library.cuDriverGetVersion(ctypes.byref(version)))
        return version.value

    def state(self, pid: int) -> ProcessState:
        state = ctypes.c_int(-1)
        self._call("cuCheckpointProcessGetState", pid, ctypes.byref(state))
        return ProcessState(state.value)

    def restore_thread_id(self, pid: int) -> int:
        tid = ctypes.c_int(0)
        self._call("cuCheckpointProcessGetRestoreThreadId", pid, ctypes.byref(tid))
        return tid.value

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._call("cuCheckpointProcessLock", pid, ctypes.byref(_LockArgs(timeout_ms=timeout_ms)))

    def checkpoint(self, pid: int) -> None:
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, gpu_map: Mapping[str, str]) -> None:
        if all(old == new for old, new in gpu_map.items()):
            # Drivers before 580 take no pairs; where nothing moves there is no reason to ask them to.
            self._call("cuCheckpointProcessRestore", pid, None)
            return
        pairs = (_GpuPair * len(gpu_map))(*(_GpuPair(_uuid(old), _uuid(new)) for old, new in gpu_map.items()))
        args = _RestoreArgs(pairs=pairs, count=len(gpu_map))
        self._call("cuCheckpointProcessRestore", pid, ctypes.byref(args))

    def unlock(self, pid: int) -> None:
        self._call("cuCheckpointProcessUnlock", pid, None)

    def _call(self, function: str, pid: int, argument: Any) -> None:
        self._check(function, getattr(self._library, function)(ctypes.c_int(pid), argument), pid)

    def _check(self, function: str, code: int, pid: int = 0) -> None:
        if code != 0:
            raise DriverError(function, code, self._error_name(code), pid)

    def _error_name(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)) == 0 and text.value:
            return text.value.decode()
        return "CUDA_ERROR_UNKNOWN"


def check_version(driver_version: str, *, remap: bool = False) -> None:
    """Raise GpuDriverTooOld unless ``driver_version`` ("570.86.10") can checkpoint, or with ``remap`` also move
    a process to another GPU."""
    needed = MIN_DRIVER_REMAP if remap else MIN_DRIVER
    branch = driver_version.split(".", 1)[0]
    if not branch.isdigit() or int(branch) < needed:
        purpose = "restoring onto another GPU of the same model" if remap else "GPU checkpoints"
        raise GpuDriverTooOld(
            f"NVIDIA driver {driver_version or '(unknown)'} is too old for {purpose}",
            hint=f"install NVIDIA driver {needed} or newer",
            driver=driver_version,
            needed=needed,
        )


def _uuid(text: str) -> _Uuid:
    """NVML's text form ("GPU-8-4-4-4-12 hex digits") as the driver's 16 bytes."""
    return _Uuid((ctypes.c_ubyte * 16).from_buffer_copy(uuid.UUID(text.removeprefix("GPU-")).bytes))
