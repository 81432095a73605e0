"""The binding: shapes of the structs, version checks, what a missing or old library turns into."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest

from relume.errors import GpuDriverTooOld, GpuUnavailable
from relume.gpu import driver

ABI = [
    line.split()
    for line in Path(__file__).with_name("cuda_abi.txt").read_text().splitlines()
    if not line.startswith("#")
]
STRUCTS: dict[str, tuple[type[ctypes.Structure], dict[str, str]]] = {
    "CUuuid": (driver._Uuid, {"bytes": "bytes"}),
    "CUcheckpointGpuPair": (driver._GpuPair, {"oldUuid": "old", "newUuid": "new"}),
    "CUcheckpointLockArgs": (
        driver._LockArgs,
        {"timeoutMs": "timeout_ms", "reserved0": "reserved0", "reserved1": "reserved1"},
    ),
    "CUcheckpointRestoreArgs": (driver._RestoreArgs, {"gpuPairs": "pairs", "gpuPairsCount": "count"}),
}
FAKE = (Path(__file__).parents[2] / "gpu" / "fake_cuda.h").read_text()


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_those_of_cuda_h(name: str) -> None:
    ours, names = STRUCTS[name]
    sizes = {row[1]: int(row[2]) for row in ABI if row[0] == "struct"}
    fields = {row[1].partition(".")[2]: row[2:] for row in ABI if row[1].startswith(f"{name}.")}
    assert ctypes.sizeof(ours) == sizes[name]
    for theirs, mine in names.items():
        field = getattr(ours, mine)
        if theirs in fields:
            assert [field.offset, field.size] == [int(number) for number in fields[theirs]], theirs
    # What a field of ours does not name is reserved in cuda.h, and must be zero.
    assert {theirs for theirs in fields if theirs not in names} <= {"reserved", "reserved1"}
    assert bytes(ours()) == bytes(ctypes.sizeof(ours))


def test_values_are_those_of_cuda_h() -> None:
    values = {row[1]: int(row[2]) for row in ABI if row[0] == "value"}
    states = {f"CU_PROCESS_STATE_{state.name}": int(state) for state in driver.ProcessState}
    assert states.items() <= values.items()
    assert values["CUDA_ERROR_OUT_OF_MEMORY"] == driver.OUT_OF_MEMORY
    assert values["CUDA_ERROR_NOT_READY"] == driver.NOT_READY
    none = ("INVALID_VALUE", "NOT_INITIALIZED", "INVALID_CONTEXT")
    assert {values[f"CUDA_ERROR_{name}"] for name in none} == driver.NO_CONTEXT
    more = ("OPERATING_SYSTEM", "NOT_SUPPORTED")
    assert {values[f"CUDA_ERROR_{name}"] for name in more} == driver.NOT_CUDA - driver.NO_CONTEXT
    # The driver of the tests must not have numbers of its own.
    for name, number in re.findall(r"([A-Z_]+) = (\d+)", FAKE.partition("enum {")[2].partition("}")[0]):
        assert values.get(f"CUDA_ERROR_{name}", 0) == int(number), name


class _Recorder:
    """A library that keeps what it was called with, as the callee would read it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, bytes | None]] = []

    def __getattr__(self, name: str) -> Any:
        def call(pid: ctypes.c_int, argument: Any) -> int:
            seen = None if argument is None else ctypes.string_at(argument, 64)
            if name == "cuCheckpointProcessRestore" and argument is not None:
                address = int.from_bytes(ctypes.string_at(argument, 64)[:8], "little")
                seen = (seen or b"")[8:] + ctypes.string_at(address, 64)
            self.calls.append((name, pid.value, seen))
            return 0

        return call


def test_arguments_as_the_driver_reads_them() -> None:
    library = _Recorder()
    real = driver.CudaDriver(library)  # type: ignore[arg-type]
    real.lock(7, 30_000)
    real.checkpoint(7)
    old, new = (f"GPU-{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}" for digit in "12")
    real.restore(7, {old: old})  # nothing moves: no arguments, as drivers before 580 want it
    real.restore(7, {old: new, new: old})
    real.unlock(7)
    pairs = b"\x11" * 16 + b"\x22" * 16 + b"\x22" * 16 + b"\x11" * 16
    assert library.calls == [
        ("cuCheckpointProcessLock", 7, (30_000).to_bytes(4, "little") + bytes(60)),
        ("cuCheckpointProcessCheckpoint", 7, None),
        ("cuCheckpointProcessRestore", 7, None),
        ("cuCheckpointProcessRestore", 7, (2).to_bytes(4, "little") + bytes(52) + pairs),
        ("cuCheckpointProcessUnlock", 7, None),
    ]


def test_uuid_is_in_the_order_of_its_text() -> None:
    assert bytes(driver._uuid("GPU-00010203-0405-0607-0809-0a0b0c0d0e0f").bytes) == bytes(range(16))


@pytest.mark.parametrize(
    ("version", "remap", "fits"),
    [
        ("570.86.10", False, True),
        ("565.57.01", False, False),
        ("575.57.08", True, False),
        ("580.65.06", True, True),
        ("610.57.04", True, True),
        ("", False, False),
        ("unknown", False, False),
    ],
)
def test_version(version: str, remap: bool, fits: bool) -> None:
    if fits:
        driver.check_version(version, remap=remap)
    else:
        with pytest.raises(GpuDriverTooOld, match=version or "unknown") as caught:
            driver.check_version(version, remap=remap)
        assert caught.value.code == "gpu/driver-too-old"
        assert "580" in caught.value.hint if remap else "570" in caught.value.hint


def test_no_library_is_no_gpu() -> None:
    with pytest.raises(GpuUnavailable, match="libnone"):
        driver.CudaDriver.load("libnone.so.1")


def test_a_library_without_the_functions_is_too_old() -> None:
    with pytest.raises(GpuDriverTooOld) as caught:
        driver.CudaDriver.load("libc.so.6")
    assert caught.value.details["missing"] == list(driver.FUNCTIONS)
