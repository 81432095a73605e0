"""Which GPUs an instance gets, and how a checkpoint's are mapped onto a copy's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.errors import GpuUnavailable
from relume.gpu.models import choose, matches, pair
from relume.gpu.nvml import Gpu, Machine
from relume.gpu.platform import facts

GIB = 1 << 30


def gpu(model: str, memory: int = 24 * GIB, index: int = 0, used: int = 0, mig: bool = False) -> Gpu:
    return Gpu(index, f"GPU-{index}", model, memory, used, mig=mig, persistence=True)


@pytest.mark.parametrize(
    ("compute", "model", "memory", "fits"),
    [
        ("TURING_T4", "Tesla T4", 15 * GIB, True),
        ("TURING_T4", "NVIDIA T4G", 15 * GIB, False),
        ("AMPERE_A10", "NVIDIA A10G", 23 * GIB, True),
        ("AMPERE_A10", "NVIDIA A100-SXM4-40GB", 40 * GIB, False),
        ("AMPERE_A100", "NVIDIA A100-SXM4-40GB", 40 * GIB, True),
        ("AMPERE_A100", "NVIDIA A100 80GB PCIe", 80 * GIB, False),
        ("AMPERE_A100_80GB", "NVIDIA A100 80GB PCIe", 80 * GIB, True),
        ("AMPERE_A100_80GB", "NVIDIA A100-PCIE-40GB", 40 * GIB, False),
        ("ADA_L4", "NVIDIA L4", 23 * GIB, True),
        ("ADA_L4", "NVIDIA L40", 46 * GIB, False),
        ("ADA_L40", "NVIDIA L40S", 46 * GIB, True),
        ("HOPPER_H100", "NVIDIA H100 80GB HBM3", 80 * GIB, True),
        ("HOPPER_H100", "NVIDIA H200", 141 * GIB, False),
        ("HOPPER_H200", "NVIDIA H200", 141 * GIB, True),
        ("TRN1", "NVIDIA L4", 24 * GIB, False),
        ("CPU", "NVIDIA L4", 24 * GIB, False),
    ],
)
def test_matches(compute: str, model: str, memory: int, fits: bool) -> None:
    assert matches(gpu(model, memory), compute) is fits


def test_the_first_entry_that_fits_wins_and_the_emptiest_gpu() -> None:
    machine = Machine(
        (gpu("NVIDIA L4", index=0, used=GIB), gpu("NVIDIA L4", index=1), gpu("NVIDIA T4", index=2))
    )
    assert [one.index for one in choose(machine, ["HOPPER_H100", "ADA_L4", "TURING_T4"], 1)] == [1]
    assert [one.index for one in choose(machine, ["ADA_L4"], 2)] == [1, 0]
    assert [one.index for one in choose(machine, ["ADA_L4"], 1, {"GPU-1"})] == [0]
    assert [one.index for one in choose(machine, ["ADA_L4"], 1, prefer=["GPU-0"])] == [0]
    assert [one.index for one in choose(machine, ["ADA_L4", "TURING_T4"], 1, model="NVIDIA T4")] == [2]


def test_what_is_not_there_is_said_with_what_is() -> None:
    machine = Machine((gpu("NVIDIA L4"), gpu("NVIDIA L4", index=1, mig=True)))
    with pytest.raises(
        GpuUnavailable, match=r"no 2 free GPUs for compute = ADA_L4.*NVIDIA L4 \(in use\), NVIDIA L4"
    ):
        choose(machine, ["ADA_L4"], 2, {"GPU-0"})
    with pytest.raises(GpuUnavailable, match="the checkpoint of NVIDIA L4"):
        choose(Machine((gpu("NVIDIA L40"),)), ["ADA_L40"], 1, model="NVIDIA L4")
    with pytest.raises(GpuUnavailable, match="NVML: no library"):
        choose(Machine(reason="NVML: no library"), ["ADA_L4"], 1)


@given(
    saved=st.lists(st.integers(0, 7), unique=True, max_size=8),
    given_=st.lists(st.integers(0, 7), unique=True, max_size=8),
)
def test_pair_maps_every_saved_gpu_onto_one_of_its_own(saved: list[int], given_: list[int]) -> None:
    old = [f"GPU-{index}" for index in saved]
    new = [gpu("NVIDIA L4", index=index) for index in given_]
    if len(old) != len(new):
        with pytest.raises(GpuUnavailable):
            pair(old, new)
        return
    mapping = pair(old, new)
    assert list(mapping) == old
    assert sorted(mapping.values()) == sorted(one.uuid for one in new)
    assert all(mapping[uuid] == uuid for uuid in old if uuid in mapping.values())


def test_facts_of_the_platform() -> None:
    machine = Machine((gpu("NVIDIA L4"), gpu("NVIDIA L4", index=1)), (), "580.65.06", 13000)
    assert facts(machine, ()) == ()
    assert facts(machine, machine.gpus) == ("2 x NVIDIA L4", "driver 580.65.06", "CUDA 13.0")
    assert facts(machine, machine.gpus[:1]) != facts(machine, machine.gpus)
