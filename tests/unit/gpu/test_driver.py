"""The binding: shapes of the structs, version checks, what a missing or old library turns into."""

from __future__ import annotations

import ctypes

import pytest

from relume.errors import GpuDriverTooOld, GpuUnavailable
from relume.gpu import driver


def test_argument_structs_have_the_size_of_cuda_h() -> None:
    assert ctypes.sizeof(driver._LockArgs) == 64
    assert ctypes.sizeof(driver._RestoreArgs) == 64
    assert ctypes.sizeof(driver._GpuPair) == 32


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
