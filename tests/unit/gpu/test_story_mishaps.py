"""Any sequence of driver errors, time-outs, helper deaths and ended processes, at any call: afterwards every process
that still lives is running and unlocked, or GpuLost says that the instance has to be killed."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_driver import GPU, Mishap, ScriptedDriver

from relume.errors import GpuLost, RelumeError
from relume.gpu.driver import ProcessState
from relume.gpu.story import GpuCheckpointer, Limits

NO_WAITING = Limits(pause_s=0)
SCRIPTS = st.lists(st.one_of(st.just(Mishap.NONE), st.sampled_from(Mishap)), max_size=40)
ANY_TIME = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pids() -> Iterator[list[int]]:
    """Three living processes: the story looks at /proc."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    yield sorted(process.pid for process in processes)
    for process in processes:
        process.kill()
        process.wait()


def running(driver: ScriptedDriver) -> bool:
    return all(state is ProcessState.RUNNING for state in driver.states.values())


@ANY_TIME
@given(script=SCRIPTS, count=st.integers(1, 3))
def test_checkpoint(pids: list[int], script: list[Mishap], count: int) -> None:
    driver = ScriptedDriver(pids[:count], script)
    gpu = GpuCheckpointer(driver, NO_WAITING)

    async def checkpoint() -> None:
        suspended = await gpu.suspend(pids[:count])
        for process in suspended.processes:
            if process.pid in driver.states:
                assert driver.states[process.pid] is ProcessState.CHECKPOINTED
        await gpu.resume(suspended)

    try:
        asyncio.run(checkpoint())
    except GpuLost as lost:
        assert lost.details["lost"]
    except RelumeError:
        assert running(driver)
    else:
        assert running(driver)


@ANY_TIME
@given(script=SCRIPTS, count=st.integers(1, 3))
def test_restore_of_a_copy(pids: list[int], script: list[Mishap], count: int) -> None:
    driver = ScriptedDriver(pids[:count], script)
    driver.states = dict.fromkeys(driver.states, ProcessState.CHECKPOINTED)
    gpu = GpuCheckpointer(driver, NO_WAITING)
    try:
        asyncio.run(gpu.restore(pids[:count], {GPU.uuid: GPU.uuid}, expected=count))
    except RelumeError:
        pass  # whatever it is: a copy is never used after an error
    else:
        assert running(driver)


@ANY_TIME
@given(
    at=st.integers(0, 30),
    mishap=st.sampled_from([mishap for mishap in Mishap if mishap not in (Mishap.FAILED, Mishap.GONE)]),
    left_over=st.lists(st.sampled_from([ProcessState.LOCKED, ProcessState.CHECKPOINTED]), max_size=3),
)
def test_one_mishap_never_costs_the_app(
    pids: list[int], at: int, mishap: Mishap, left_over: list[ProcessState]
) -> None:
    """Not even where a node before us died in the middle."""
    driver = ScriptedDriver(pids, [Mishap.NONE] * at + [mishap])
    driver.states |= dict(zip(pids, left_over, strict=False))
    gpu = GpuCheckpointer(driver, NO_WAITING)

    async def checkpoint() -> None:
        suspended = await gpu.suspend(pids)
        assert set(driver.states.values()) == {ProcessState.CHECKPOINTED}
        await gpu.resume(suspended)

    try:
        asyncio.run(checkpoint())
    except GpuLost:
        raise
    except RelumeError as error:
        assert mishap is not Mishap.NONE, error
        if driver.calls:  # else it was over before anything was touched
            assert running(driver)
    else:
        assert running(driver)


@ANY_TIME
@given(script=SCRIPTS, at=st.integers(0, 90))
def test_cancelled_anywhere(pids: list[int], script: list[Mishap], at: int) -> None:
    driver = ScriptedDriver(pids, [mishap for mishap in script if mishap is not Mishap.FAILED])
    gpu = GpuCheckpointer(driver, NO_WAITING)

    async def checkpoint() -> None:
        await gpu.resume(await gpu.suspend(pids))

    async def cancelled() -> None:
        task = asyncio.create_task(checkpoint())
        for _ in range(at):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    try:
        asyncio.run(cancelled())
    except GpuLost as lost:
        assert lost.details["lost"]
    except RelumeError:
        assert running(driver)
    else:
        assert running(driver)


def test_order_without_mishaps(pids: list[int]) -> None:
    driver = ScriptedDriver(pids)
    gpu = GpuCheckpointer(driver, NO_WAITING)

    async def checkpoint() -> None:
        await gpu.resume(await gpu.suspend(pids))

    asyncio.run(checkpoint())
    phases = [call for call, _ in driver.calls]
    assert [phase for phase, following in pairwise([*phases, ""]) if phase != following] == [
        "lock", "checkpoint", "restore", "unlock",
    ]  # fmt: skip
    assert driver.illegal == [] and driver.maps == [{}] * 3


def test_unlock_that_never_works_is_lost(pids: list[int]) -> None:
    driver = ScriptedDriver(pids, refuse_for_ever=frozenset({"unlock"}))
    gpu = GpuCheckpointer(driver, NO_WAITING)

    async def checkpoint() -> None:
        await gpu.resume(await gpu.suspend(pids))

    with pytest.raises(GpuLost) as caught:
        asyncio.run(checkpoint())
    assert [lost["pid"] for lost in caught.value.details["lost"]] == pids
