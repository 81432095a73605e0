"""What /proc and NVML say of processes; arithmetic of address ranges."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from relume.gpu.check import Workload
from relume.gpu.client import DriverHelper
from relume.gpu.driver import ProcessState
from relume.gpu.nvml import Gpu, Holder, Machine
from relume.gpu.processes import Range, _names_processes, added, anonymous_memory, look, take_census

SIZE = 16 << 20


async def test_the_census_finds_the_ones_with_a_context(
    helper: DriverHelper, start_app: Callable[..., Awaitable[Workload]]
) -> None:
    small, large = await start_app(size=4 << 20), await start_app(size=16 << 20)
    census = await take_census(helper, [os.getpid(), small.pid, large.pid, 2**22 + 1])
    assert {process.pid: process.device_bytes for process in census.cuda} == {
        small.pid: 4 << 20,
        large.pid: 16 << 20,
    }
    assert {process.state for process in census.cuda} == {ProcessState.RUNNING}
    assert census.strays == ()


async def test_traces_of_a_process(app: Workload) -> None:
    traces = look(app.pid)
    assert traces is not None and traces.library and not traces.stopped
    assert not (traces.nccl or traces.ipc or traces.uvm_bytes)
    assert look(2**22 + 1) is None


async def test_a_process_that_ended_has_no_memory() -> None:
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    assert anonymous_memory(process.pid) == ()


def test_memory_without_a_file_is_counted_whatever_its_kind() -> None:
    before = anonymous_memory(os.getpid())
    descriptor = os.memfd_create("relume-test")
    os.ftruncate(descriptor, SIZE)
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE), mmap.mmap(-1, SIZE), mmap.mmap(descriptor, SIZE):
        grown = sum(part.size for part in added(before, anonymous_memory(os.getpid())))
    os.close(descriptor)
    assert 3 * SIZE <= grown < 4 * SIZE


GPU = Gpu(0, "GPU-a", "NVIDIA L4", 24 << 30, 8 << 30, mig=False, persistence=True)


def test_when_nvmls_list_of_processes_counts() -> None:
    here, elsewhere = Holder(os.getpid(), "GPU-a", 1, mps=False), Holder(2**22 + 1, "GPU-a", 1, mps=False)
    assert _names_processes(Machine((GPU,), (here,)))
    assert not _names_processes(Machine((GPU,), (here, elsewhere)))  # pids of another namespace
    assert not _names_processes(Machine((GPU,)))  # 8 GiB in use, and by nobody
    assert _names_processes(Machine((replace(GPU, used_bytes=500 << 20),)))


RANGES = st.lists(st.integers(0, 60), unique=True).map(
    lambda edges: [Range(a, b) for a, b in zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False)]
)


@given(before=RANGES, after=RANGES)
def test_added_is_the_difference(before: list[Range], after: list[Range]) -> None:
    def cells(ranges: object) -> set[int]:
        return {cell for part in ranges for cell in range(part.start, part.end)}  # type: ignore[attr-defined]

    result = added(before, after)
    assert cells(result) == cells(after) - cells(before)
    assert all(part.size > 0 for part in result)
    assert sum(part.size for part in result) == len(cells(result))
