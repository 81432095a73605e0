"""The helper process: its calls, its deadlines, its death, and a machine without a GPU."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from fake_driver import FakeMachine

from relume.errors import GpuDriverTooOld, GpuTimeout, GpuUnavailable
from relume.gpu.check import Workload
from relume.gpu.client import DriverHelper
from relume.gpu.driver import DriverError, ProcessState


async def test_it_answers_for_a_process_with_a_context(helper: DriverHelper, app: Workload) -> None:
    assert await helper.state(app.pid) is ProcessState.RUNNING
    tid = await helper.restore_thread_id(app.pid)
    assert tid != app.pid and Path(f"/proc/{app.pid}/task/{tid}").exists()
    machine = await helper.survey()
    assert [gpu.model for gpu in machine.gpus] == ["NVIDIA L4"]
    assert (app.pid, 8 << 20) in [(holder.pid, holder.used_bytes) for holder in machine.holders]
    assert machine.driver_version == "580.65.06" and machine.cuda_version == 13000


async def test_a_process_without_a_context_is_a_driver_error(helper: DriverHelper) -> None:
    with pytest.raises(DriverError) as caught:
        await helper.state(os.getpid())
    assert (caught.value.call, caught.value.name) == (
        "cuCheckpointProcessGetState",
        "CUDA_ERROR_NOT_INITIALIZED",
    )


async def test_one_process_serves_all_calls_and_does_not_queue_them(
    helper: DriverHelper, app: Workload, fake: FakeMachine
) -> None:
    await helper.state(app.pid)
    first = helper.pid
    fake.fault("lock", 600, delay_ms=3000)
    slow = asyncio.create_task(helper.lock(app.pid, 5))
    await asyncio.sleep(0.1)
    assert await helper.state(app.pid) is ProcessState.RUNNING
    assert not slow.done()
    with pytest.raises(DriverError, match="NOT_READY"):
        await slow
    assert helper.pid == first


async def test_a_call_that_hangs_costs_the_helper_and_nothing_else(
    helper: DriverHelper, app: Workload, fake: FakeMachine
) -> None:
    await helper.lock(app.pid, 5)
    stuck = helper.pid
    fake.fault("checkpoint", 999, also="hang")
    with pytest.raises(GpuTimeout, match=f"checkpoint for process {app.pid} within 0.3 s"):
        await helper.checkpoint(app.pid, 0.3)
    assert await helper.state(app.pid) is ProcessState.LOCKED
    assert helper.pid != stuck
    assert stuck is not None and not Path(f"/proc/{stuck}").exists()


async def test_its_death_fails_the_calls_in_flight_and_the_next_has_a_new_one(
    helper: DriverHelper, app: Workload, fake: FakeMachine
) -> None:
    fake.fault("unlock", 999, delay_ms=200, also="abort")
    fake.fault("lock", 999, delay_ms=2000)
    dying, waiting = asyncio.create_task(helper.unlock(app.pid)), asyncio.create_task(helper.lock(app.pid, 5))
    for call in (dying, waiting):
        with pytest.raises(GpuUnavailable, match="ended in the middle of a call"):
            await call
    assert await helper.state(app.pid) is ProcessState.RUNNING


async def test_it_ends_when_the_node_is_gone(fake: FakeMachine) -> None:
    helper = DriverHelper(env=fake.env)
    await helper.hello()
    pid = helper.pid
    await helper.close()
    await helper.close()
    assert pid is not None and helper.pid is None and not Path(f"/proc/{pid}").exists()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_no_descriptor_is_left_after_many_deaths(helper: DriverHelper, fake: FakeMachine) -> None:
    await helper.hello()
    before = open_descriptors()
    for _ in range(5):
        fake.fault("state", 999, also="abort")
        with pytest.raises(GpuUnavailable):
            await helper.state(os.getpid())
    await helper.hello()
    assert open_descriptors() == before


async def test_a_machine_without_a_driver_is_no_gpu_and_no_crash(no_gpu: dict[str, str]) -> None:
    async with DriverHelper(env=no_gpu) as helper:
        machine = await helper.survey()
        assert machine.gpus == () and machine.reason.startswith("NVML")
        assert (await helper.hello())["ready"] is False
        with pytest.raises(GpuUnavailable, match="libcuda"):
            await helper.state(os.getpid())


async def test_a_driver_that_does_not_start_is_tried_again(fake: FakeMachine) -> None:
    fake.fault("init", 999)
    async with DriverHelper(env=fake.env) as helper:
        with pytest.raises(GpuUnavailable, match="CUDA_ERROR_UNKNOWN"):
            await helper.state(os.getpid())
        with pytest.raises(DriverError, match="NOT_INITIALIZED"):
            await helper.state(os.getpid())


async def test_an_old_libcuda_is_named_so(fake: FakeMachine, library: Path) -> None:
    fake.library.unlink()
    fake.library.mkdir()
    (fake.library / "libcuda.so.1").symlink_to("/lib/x86_64-linux-gnu/libz.so.1")
    (fake.library / "libnvidia-ml.so.1").symlink_to(library / "libcuda.so.1")
    async with DriverHelper(env=fake.env) as helper:
        with pytest.raises(GpuDriverTooOld, match="cuCheckpointProcessLock"):
            await helper.state(os.getpid())
