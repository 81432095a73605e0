"""The stories against the fake driver: device memory really moves, apps really block, helpers really die."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fake_driver import UUIDS, FakeMachine

from relume.errors import GpuDriverTooOld, GpuError, GpuLost, GpuTimeout, GpuUnavailable, GpuUnsupported
from relume.gpu.check import Workload
from relume.gpu.client import DriverHelper
from relume.gpu.driver import ProcessState
from relume.gpu.processes import Range
from relume.gpu.story import GpuCheckpointer, Limits, needed

MIB = 1 << 20
QUICK = Limits(lock_s=2, checkpoint_s=5, restore_s=5, pause_s=0.05)


@pytest.fixture
def gpu(helper: DriverHelper) -> GpuCheckpointer:
    return GpuCheckpointer(helper, QUICK)


def resident(pid: int) -> int:
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def memory_at(pid: int, part: Range) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb") as memory:
        memory.seek(part.start)
        return memory.read(part.size)


async def test_device_memory_goes_to_the_host_and_comes_back(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine
) -> None:
    await app.ask("fill", size=64 * MIB, blocks=3, seed=1)
    content, before, held = await app.content(), resident(app.pid), fake.device_bytes()
    suspended = await gpu.suspend([app.pid])
    assert fake.device_bytes() == 0
    assert resident(app.pid) - before > 0.9 * held
    assert suspended.host_bytes == held == suspended.processes[0].device_bytes
    assert suspended.gpus == (UUIDS[0],)
    resumed = await gpu.resume(suspended)
    assert resumed.pids == (app.pid,)
    assert fake.device_bytes() == held
    assert resident(app.pid) < before + 8 * MIB
    assert await app.content() == content


async def test_the_app_waits_while_suspended_and_goes_on(gpu: GpuCheckpointer, app: Workload) -> None:
    content = await app.content()
    suspended = await gpu.suspend([app.pid])
    asking = asyncio.create_task(app.content())
    assert not (await asyncio.wait([asking], timeout=0.3))[0]
    await gpu.resume(suspended)
    assert await asking == content


async def test_the_ranges_are_where_the_memory_went(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine
) -> None:
    file = next(fake.state.glob("dev0/*"))
    expected = file.read_bytes()
    suspended = await gpu.suspend([app.pid])
    found = b"".join(memory_at(app.pid, part) for part in suspended.processes[0].ranges)
    assert expected in found
    await gpu.resume(suspended)


async def test_an_instance_without_cuda_is_left_alone(gpu: GpuCheckpointer) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        suspended = await gpu.suspend([process.pid, 2**22 + 1])
        assert suspended.processes == () and suspended.host_bytes == 0
        assert (await gpu.resume(suspended)).pids == ()
    finally:
        process.kill()
        await process.wait()


async def test_graphs_and_streams_work_after_it(gpu: GpuCheckpointer, app: Workload) -> None:
    async def write_and_launch() -> str:
        await app.ask("write", seed=7)
        await app.ask("launch")
        return await app.content()

    await app.ask("graph")
    expected = await write_and_launch()
    await gpu.resume(await gpu.suspend([app.pid]))
    assert await app.content() == expected
    assert await write_and_launch() == expected


async def test_several_processes(
    gpu: GpuCheckpointer, start_app: Callable[..., Awaitable[Workload]], helper: DriverHelper
) -> None:
    apps = [await start_app() for _ in range(3)]
    contents = [await app.content() for app in apps]
    suspended = await gpu.suspend([app.pid for app in apps])
    assert {process.pid for process in suspended.processes} == {app.pid for app in apps}
    assert [await helper.state(app.pid) for app in apps] == [ProcessState.CHECKPOINTED] * 3
    await gpu.resume(suspended)
    assert [await app.content() for app in apps] == contents


async def test_work_that_never_ends_is_a_timeout_and_the_app_goes_on(
    helper: DriverHelper, start_app: Callable[..., Awaitable[Workload]]
) -> None:
    gpu = GpuCheckpointer(helper, Limits(lock_s=0.2))
    idle, busy = await start_app(), await start_app()
    await busy.ask("kernel", ms=3_600_000)
    with pytest.raises(GpuTimeout, match="still had work") as caught:
        await gpu.suspend([idle.pid, busy.pid])
    assert caught.value.details["pid"] == busy.pid
    assert [await helper.state(app.pid) for app in (idle, busy)] == [ProcessState.RUNNING] * 2
    await idle.content()


@pytest.mark.parametrize("also", ["-", "after"])
@pytest.mark.parametrize(("call", "code"), [("lock", 801), ("checkpoint", 801), ("checkpoint", 2)])
async def test_an_error_undoes_everything(
    gpu: GpuCheckpointer,
    start_app: Callable[..., Awaitable[Workload]],
    fake: FakeMachine,
    call: str,
    code: int,
    also: str,
) -> None:
    apps = [await start_app(), await start_app()]
    contents = [await app.content() for app in apps]
    fake.fault(call, code, pid=max(app.pid for app in apps), also=also)
    with pytest.raises(GpuError) as caught:
        await gpu.suspend([app.pid for app in apps])
    assert not isinstance(caught.value, GpuLost)
    assert isinstance(caught.value, GpuUnsupported) == (code == 801)
    assert [await app.content() for app in apps] == contents


@pytest.mark.parametrize("also", ["abort", "hang"])
@pytest.mark.parametrize("call", ["lock", "checkpoint"])
async def test_a_helper_that_dies_or_hangs_undoes_everything(
    helper: DriverHelper, app: Workload, fake: FakeMachine, call: str, also: str
) -> None:
    gpu = GpuCheckpointer(helper, Limits(lock_s=0.2, checkpoint_s=0.5, pause_s=0.05))
    content = await app.content()
    fake.fault(call, 999, also=also)
    with pytest.raises((GpuUnavailable, GpuTimeout)):
        await gpu.suspend([app.pid])
    assert await app.content() == content


async def test_a_failed_process_is_lost(gpu: GpuCheckpointer, app: Workload, fake: FakeMachine) -> None:
    fake.fault("checkpoint", 801, also="failed")
    with pytest.raises(GpuLost, match="NOT_SUPPORTED") as caught:
        await gpu.suspend([app.pid])
    assert [lost["pid"] for lost in caught.value.details["lost"]] == [app.pid]


async def test_a_resume_is_tried_again(gpu: GpuCheckpointer, app: Workload, fake: FakeMachine) -> None:
    content = await app.content()
    suspended = await gpu.suspend([app.pid])
    fake.fault("restore", 2)
    fake.fault("unlock", 999)
    await gpu.resume(suspended)
    assert await app.content() == content


def take_memory(fake: FakeMachine) -> Path:
    other = fake.state / "dev0/another"
    other.touch()
    with other.open("r+b") as file:
        file.truncate((1 << 30) - MIB)
    return other


@pytest.mark.parametrize("copy", [False, True])
async def test_memory_that_another_took_meanwhile_is_waited_for(
    helper: DriverHelper, app: Workload, fake: FakeMachine, copy: bool
) -> None:
    gpu = GpuCheckpointer(helper, Limits(pause_s=0.3))
    content = await app.content()
    suspended = await gpu.suspend([app.pid])
    other = take_memory(fake)
    if copy:
        gpu_map = {UUIDS[0]: UUIDS[0]}
        coming = gpu.restore([app.pid], gpu_map, expected=1, needs=suspended.needs)
    else:
        coming = gpu.resume(suspended)
    resuming = asyncio.create_task(coming)
    await asyncio.sleep(0.5)
    assert not resuming.done()
    other.unlink()
    await resuming
    assert await app.content() == content


async def test_memory_that_does_not_come_free_is_the_end(
    helper: DriverHelper, app: Workload, fake: FakeMachine
) -> None:
    gpu = GpuCheckpointer(helper, Limits(pause_s=0.05, room_s=0.3))
    suspended = await gpu.suspend([app.pid])
    take_memory(fake)
    with pytest.raises(GpuLost, match=r"OUT_OF_MEMORY|OPERATING_SYSTEM"):
        await gpu.resume(suspended)


def test_what_a_restore_needs_by_gpu() -> None:
    assert needed([(("a",), 3), (("a",), 4), (("b",), None), (("a", "b"), 9), ((), 1)]) == {"a": 7}


async def test_a_resume_that_never_works_is_lost(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine
) -> None:
    suspended = await gpu.suspend([app.pid])
    fake.fault("restore", 2, times=99)
    with pytest.raises(GpuLost, match="OUT_OF_MEMORY"):
        await gpu.resume(suspended)


async def test_a_cancelled_checkpoint_undoes_everything(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine, helper: DriverHelper
) -> None:
    content = await app.content()
    fake.fault("checkpoint", 0, delay_ms=300)
    suspending = asyncio.create_task(gpu.suspend([app.pid]))
    while await helper.state(app.pid) is not ProcessState.LOCKED:  # noqa: ASYNC110 - it is another process's
        await asyncio.sleep(0.01)
    suspending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert await app.content() == content


async def test_a_node_that_died_in_between_brings_it_back(fake: FakeMachine, app: Workload) -> None:
    content = await app.content()
    async with DriverHelper(env=fake.env) as first:
        await GpuCheckpointer(first, QUICK).suspend([app.pid])
    async with DriverHelper(env=fake.env) as second:
        await GpuCheckpointer(second, QUICK).recover([app.pid])
    assert await app.content() == content


async def test_what_a_dead_node_left_suspended_can_be_suspended(gpu: GpuCheckpointer, app: Workload) -> None:
    content = await app.content()
    await gpu.suspend([app.pid])
    await gpu.resume(await gpu.suspend([app.pid]))
    assert await app.content() == content


async def test_a_copy_goes_to_another_gpu_of_the_model(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine
) -> None:
    fake.describe(gpus=2)
    content = await app.content()
    suspended = await gpu.suspend([app.pid])
    await gpu.restore([app.pid], {UUIDS[0]: UUIDS[1]}, expected=1)
    assert not list(fake.state.glob("dev0/*")) and list(fake.state.glob("dev1/*"))
    assert await app.content() == content
    assert suspended.gpus == (UUIDS[0],)


async def test_a_driver_before_580_cannot_move_a_copy(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine
) -> None:
    fake.describe(gpus=2, version="570.86.10", cuda=12080)
    await gpu.suspend([app.pid])
    with pytest.raises(GpuDriverTooOld, match="another GPU"):
        await gpu.restore([app.pid], {UUIDS[0]: UUIDS[1]}, expected=1)
    await gpu.restore([app.pid], {UUIDS[0]: UUIDS[0]}, expected=1)


async def test_a_driver_before_570_is_refused_before_anything(
    gpu: GpuCheckpointer, app: Workload, fake: FakeMachine, helper: DriverHelper
) -> None:
    fake.describe(version="565.57.01", cuda=12070)
    with pytest.raises(GpuDriverTooOld):
        await gpu.suspend([app.pid])
    assert await helper.state(app.pid) is ProcessState.RUNNING


async def test_a_copy_with_fewer_processes_than_were_saved_is_lost(
    gpu: GpuCheckpointer, app: Workload
) -> None:
    await gpu.suspend([app.pid])
    with pytest.raises(GpuLost, match="2 processes had GPU memory in the checkpoint, 1 of the copy"):
        await gpu.restore([app.pid], {}, expected=2)
