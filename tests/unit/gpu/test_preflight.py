"""What is refused before anything is touched: each obstacle by its name, and memory with its numbers."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_driver import FakeMachine

from relume.errors import GpuDriverTooOld, GpuMemory, GpuUnsupported
from relume.gpu.check import Workload
from relume.gpu.client import DriverHelper
from relume.gpu.driver import ProcessState
from relume.gpu.nvml import Gpu, Holder, Machine
from relume.gpu.preflight import UVM_TOLERATED, judge, preflight
from relume.gpu.processes import Census, CudaProcess, Traces

GIB = 1 << 30
GPU = Gpu(0, "GPU-a", "NVIDIA L4", 24 * GIB, 3 * GIB, mig=False, persistence=True)
TRACES = Traces(7, 1, "python", True, ("/dev/nvidia0",), 2 << 20, nccl=False, ipc=False, stopped=False)
PROCESS = CudaProcess(7, "python", ProcessState.RUNNING, 2 * GIB, ("GPU-a",), False, TRACES)
CENSUS = Census((PROCESS,), (), Machine((GPU,), (), "570.86.10", 12080))


def verdict(census: Census, limit: int | None = None, available: int | None = None) -> Any:
    return judge(census, memory_limit=limit, host_bytes=1 * GIB, available_bytes=available, max_gpus=1)


def with_process(**changes: Any) -> Census:
    return replace(CENSUS, cuda=(replace(PROCESS, **changes),))


def with_traces(**changes: Any) -> Census:
    return with_process(traces=replace(TRACES, **changes))


def test_what_fits_is_a_budget() -> None:
    budget = verdict(CENSUS, 3 * GIB)
    assert (budget.pids, budget.host_bytes, budget.device_bytes, budget.needed) == (
        (7,),
        GIB,
        2 * GIB,
        3 * GIB,
    )


def test_no_context_needs_nothing() -> None:
    budget = verdict(Census((), (), Machine(reason="NVML: none")), 1)
    assert budget.pids == () and budget.device_bytes == 0


@pytest.mark.parametrize(
    ("census", "name"),
    [
        (with_process(state=ProcessState.FAILED), "failed"),
        (with_traces(stopped=True), "stopped"),
        (with_process(mps=True), "mps"),
        (with_traces(uvm_bytes=UVM_TOLERATED + 1), "uvm"),
        (with_traces(nccl=True), "nccl"),
        (with_traces(ipc=True), "ipc"),
        (with_process(gpus=("GPU-a", "GPU-b")), "gpus"),
        (replace(CENSUS, strays=(replace(TRACES, pid=8, name="exporter"),)), "device"),
        (replace(CENSUS, machine=replace(CENSUS.machine, gpus=(replace(GPU, mig=True),))), "mig"),
    ],
)
def test_obstacles_by_name(census: Census, name: str) -> None:
    with pytest.raises(GpuUnsupported) as caught:
        verdict(census)
    assert [obstacle["name"] for obstacle in caught.value.details["obstacles"]] == [name]
    assert all(obstacle["hint"] for obstacle in caught.value.details["obstacles"])


def test_several_obstacles_are_all_named() -> None:
    with pytest.raises(GpuUnsupported, match=r"managed memory.*NCCL"):
        verdict(with_traces(uvm_bytes=GIB, nccl=True))


def test_mig_on_a_gpu_that_is_not_ours_is_no_obstacle() -> None:
    other = replace(GPU, index=1, uuid="GPU-b", mig=True)
    verdict(replace(CENSUS, machine=replace(CENSUS.machine, gpus=(GPU, other))))


def test_memory_over_the_limit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        GpuMemory, match=r"1\.0 GiB in use and 2\.0 GiB on the GPU .* limit of 2\.5 GiB"
    ) as caught:
        verdict(CENSUS, 5 * GIB // 2)
    assert caught.value.code == "insufficient_memory"
    assert caught.value.details == {"host_bytes": GIB, "device_bytes": 2 * GIB, "limit_bytes": 5 * GIB // 2}
    assert "empty_cache" in caught.value.hint and "memory to 4 or more" in caught.value.hint


def test_the_machine_must_have_the_memory_too() -> None:
    with pytest.raises(GpuMemory, match="this machine"):
        verdict(CENSUS, None, GIB)
    verdict(CENSUS, None, 2 * GIB)


def test_memory_that_nvml_does_not_tell_counts_as_all_in_use_on_the_gpu() -> None:
    assert verdict(with_process(device_bytes=None)).device_bytes == 3 * GIB


def test_what_nvml_does_not_tell_is_counted_once_and_without_what_others_have() -> None:
    silent = [replace(PROCESS, pid=pid, device_bytes=None, gpus=()) for pid in (8, 9)]
    holders = (Holder(7, "GPU-a", 2 * GIB, mps=False), Holder(1, "GPU-a", GIB // 2, mps=False))
    census = Census((PROCESS, *silent), (), replace(CENSUS.machine, holders=holders))
    assert verdict(census).device_bytes == 2 * GIB + GIB // 2


def test_an_old_driver_is_refused() -> None:
    with pytest.raises(GpuDriverTooOld):
        verdict(replace(CENSUS, machine=replace(CENSUS.machine, driver_version="550.90.07")))


async def test_a_real_process_is_measured(helper: DriverHelper, app: Workload) -> None:
    budget = await preflight(helper, [app.pid, os.getpid()], memory_limit=GIB, host_bytes=GIB // 2)
    assert budget.pids == (app.pid,) and budget.device_bytes == 8 << 20
    with pytest.raises(GpuMemory):
        await preflight(helper, [app.pid], memory_limit=GIB, host_bytes=GIB - 1)


async def test_mig_mps_and_stopped_processes_are_seen(
    helper: DriverHelper, start_app: Callable[..., Awaitable[Workload]], fake: FakeMachine
) -> None:
    app = await start_app()
    fake.describe(mig=True)
    (fake.state / "mps").write_text(f"{app.pid}\n")
    os.kill(app.pid, signal.SIGSTOP)
    try:
        with pytest.raises(GpuUnsupported) as caught:
            await preflight(helper, [app.pid], memory_limit=None, host_bytes=0)
    finally:
        os.kill(app.pid, signal.SIGCONT)
    assert [obstacle["name"] for obstacle in caught.value.details["obstacles"]] == ["stopped", "mps", "mig"]
