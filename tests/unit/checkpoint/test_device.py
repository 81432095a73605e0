"""Device memory around a dump, with a driver that does as it is told: it comes back whatever the dump comes to."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))

from scripted_driver import GPU, Mishap, ScriptedDriver

from relume.checkpoint.device import DeviceMemory, GpuShare, record_of
from relume.engine.jobs import DumpResult
from relume.errors import EngineError, GpuLost, GpuMemory, GpuUnsupported
from relume.gpu import GpuCheckpointer, ProcessState
from relume.gpu.story import Limits

SHARE = GpuShare(
    (GPU.uuid,), GPU.model, ("1 x NVIDIA L4", "driver 570.86.10"), ("/dev/nvidia0",), ("/usr/lib/x",)
)
PID = os.getpid()


@pytest.fixture
def driver() -> ScriptedDriver:
    return ScriptedDriver([PID])


@pytest.fixture
def memory(driver: ScriptedDriver) -> DeviceMemory:
    return DeviceMemory(lambda: GpuCheckpointer(driver, Limits(pause_s=0.01)))


async def test_it_is_away_during_the_dump_and_back_after(
    memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path
) -> None:
    async def dump() -> DumpResult:
        assert driver.states == {PID: ProcessState.CHECKPOINTED}
        assert record_of(tmp_path)["uuids"] == [GPU.uuid]
        return DumpResult("d")

    assert await memory.around(SHARE, [PID], tmp_path, dump) == DumpResult("d")
    assert driver.states == {PID: ProcessState.RUNNING}
    record = record_of(tmp_path)
    assert GpuShare.from_dict(record) == SHARE
    assert [process["inside"] for process in record["processes"]] == [PID]
    assert record["gpus"] == [GPU.uuid]


async def test_a_dump_that_fails(memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path) -> None:
    async def dump() -> DumpResult:
        raise EngineError("the keeper is gone")

    with pytest.raises(EngineError, match="gone"):
        await memory.around(SHARE, [PID], tmp_path, dump)
    assert driver.states == {PID: ProcessState.RUNNING}


async def test_a_disk_without_room_for_the_record(
    memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path
) -> None:
    async def dump() -> DumpResult:
        raise AssertionError("nothing is to be dumped")

    with pytest.raises(OSError, match="none"):
        await memory.around(SHARE, [PID], tmp_path / "none", dump)
    assert driver.states == {PID: ProcessState.RUNNING}


async def test_a_node_that_ends_waits_for_the_dump(
    memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path
) -> None:
    frozen, thawed = asyncio.Event(), asyncio.Event()

    async def dump() -> DumpResult:
        frozen.set()
        await thawed.wait()
        assert driver.states == {PID: ProcessState.CHECKPOINTED}
        return DumpResult("d")

    going = asyncio.create_task(memory.around(SHARE, [PID], tmp_path, dump))
    await frozen.wait()
    going.cancel()
    await asyncio.sleep(0.05)
    assert not going.done() and driver.states == {PID: ProcessState.CHECKPOINTED}
    thawed.set()
    with pytest.raises(asyncio.CancelledError):
        await going
    assert driver.states == {PID: ProcessState.RUNNING}


async def test_a_driver_that_refuses_leaves_nothing_to_dump(
    memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path
) -> None:
    async def dump() -> DumpResult:
        raise AssertionError("nothing is to be dumped")

    driver.refuse_for_ever = frozenset({"checkpoint"})
    with pytest.raises(GpuUnsupported):
        await memory.around(SHARE, [PID], tmp_path, dump)
    assert driver.states == {PID: ProcessState.RUNNING} and record_of(tmp_path) == {}


async def test_an_original_that_is_lost(memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path) -> None:
    async def dump() -> DumpResult:
        return DumpResult("d")

    driver.refuse_for_ever = frozenset({"restore"})
    with pytest.raises(GpuLost):
        await memory.around(SHARE, [PID], tmp_path, dump)
    driver.refuse_for_ever = frozenset()
    await memory.recover([PID])
    assert driver.states == {PID: ProcessState.RUNNING}


async def test_memory_is_added_up_before(memory: DeviceMemory) -> None:
    async def examine(limit: int) -> int:
        return await memory.examine([PID], memory_limit=limit, host_bytes=10 << 20, available_bytes=1 << 40)

    assert await examine(11 << 20) == 1 << 20
    with pytest.raises(GpuMemory) as refused:
        await examine((11 << 20) - 1)
    assert refused.value.details["device_bytes"] == 1 << 20


async def test_a_copy_gets_what_the_record_says(memory: DeviceMemory, driver: ScriptedDriver) -> None:
    driver.states = {PID: ProcessState.CHECKPOINTED}
    gpu_map = {GPU.uuid: GPU.uuid}
    saved = {"processes": [{"gpus": [GPU.uuid], "device_bytes": 1 << 20}]}
    await memory.restore([PID], gpu_map, saved)
    assert driver.states == {PID: ProcessState.RUNNING} and driver.maps == [gpu_map]
    with pytest.raises(GpuLost, match="1 processes had GPU memory"):
        await memory.restore([PID], gpu_map, saved)


async def test_a_helper_that_dies_in_the_middle(
    memory: DeviceMemory, driver: ScriptedDriver, tmp_path: Path
) -> None:
    async def dump() -> DumpResult:
        driver.script = [Mishap.DEAD, Mishap.DEAD_AFTER]
        return DumpResult("d")

    assert (await memory.around(SHARE, [PID], tmp_path, dump)).dump_id == "d"
    assert driver.states == {PID: ProcessState.RUNNING}
