"""The whole GPU path on this machine, one JSON object a line: ``script/gpu-check`` runs this.

Each step says ``"ok"``: true, false, or null where it could not be made, and then in ``missing`` which file, program or
privilege it lacks. Steps: ``versions``; ``plain`` and ``graphs``, which suspend and resume a process of ours with
device memory of known content (the second with many blocks, a stream, a captured graph and a kernel); ``move``, onto
another GPU of the model; ``container``, through runc and CRIU into a copy; ``paged``, the same with the copy's memory
from relume's pager. Rates are bytes/s; ``pinned`` is a plain copy between
pinned memory and the device in the same process, the bus's own speed.

Ends with 0 if no step was wrong, 1 if one was, 3 if none could be made.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from relume import __version__
from relume.errors import RelumeError
from relume.gpu import cdi
from relume.gpu.check_container import container_requirements, container_step
from relume.gpu.client import DriverHelper
from relume.gpu.driver import MIN_DRIVER_REMAP
from relume.gpu.nvml import Machine
from relume.gpu.platform import cuda_text
from relume.gpu.story import GpuCheckpointer, Resumed, Suspended
from relume.linux import memory

GIB: Final = 1 << 30
REGISTERED: Final = 16 << 20
"""Bytes of the workload's own memory that the driver pins."""
Report = dict[str, Any]


class Missing(Exception):
    """A step cannot be made here. The arguments are what is missing."""


@dataclass(slots=True)
class Workload:
    """A ``relume.gpu.workload`` of ours, on pipes."""

    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    async def content(self) -> str:
        """A hash of all its device memory."""
        return str((await self.ask("hash"))["hash"])

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError with the workload's words, or EOFError if it is gone."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        line = await self.process.stdout.readline()
        if not line:
            raise EOFError(f"the workload ended in {op}")
        answer: dict[str, Any] = json.loads(line)
        if not answer.pop("ok"):
            raise RuntimeError(f"the workload's {op}: {answer['error']}")
        return answer


@asynccontextmanager
async def workload(env: Mapping[str, str] | None = None) -> AsyncIterator[Workload]:
    """Started here, with our environment or ``env``; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relume.gpu.workload",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=env,
    )
    assert process.stdout and process.stdin
    try:
        await process.stdout.readline()
        yield Workload(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.stdin.close()
        await process.wait()


async def round_trip(
    driver: DriverHelper, size: int, blocks: int, *, graph: bool, gpu_map: Mapping[str, str] | None = None
) -> Report:
    """Suspend and bring back one process; content compared before and after, and after running on."""
    gpu = GpuCheckpointer(driver)
    async with workload() as app:
        await app.ask("fill", size=size, blocks=blocks, seed=size)
        await app.ask("register", size=REGISTERED)
        without_kernel = ""
        if graph:
            await app.ask("graph")
            await app.ask("launch")
            try:
                await app.ask("mix", seed=size)
            except RuntimeError as error:  # no JIT compiler beside the driver, or PTX it does not know
                without_kernel = str(error)
        pinned = await app.ask("bandwidth", size=min(size, 256 << 20))
        before = await app.ask("hash")
        suspended = await gpu.suspend([app.pid])
        if gpu_map is None:
            resumed = await gpu.resume(suspended)
        else:
            resumed = await gpu.restore([app.pid], gpu_map, expected=1)
        after = await app.ask("hash")
        ran_on = True
        if graph:
            await app.ask("write", seed=size)
            await app.ask("launch")
            if not without_kernel:
                await app.ask("mix", seed=size)
            ran_on = (await app.ask("hash")) == before
        same = before == after
        pinned_again = (await app.ask("pinned"))["equal"]
        return {
            "ok": same and ran_on and pinned_again,
            "content_equal": same,
            "registered_memory_equal": pinned_again,
            **(
                {"graph_runs_on": ran_on, "kernel_runs_on": None if without_kernel else ran_on}
                if graph
                else {}
            ),
            **({"without_kernel": without_kernel} if without_kernel else {}),
            "bytes": before["bytes"],
            "blocks": blocks,
            **_times(suspended, resumed, before["bytes"], pinned),
        }


def _times(suspended: Suspended, resumed: Resumed, size: int, pinned: Mapping[str, float]) -> Report:
    (process,) = suspended.processes
    out, back = size / process.checkpoint_s, size / max(resumed.restore_s, 1e-9)
    return {
        "host_bytes": process.host_bytes,
        "lock_s": round(process.lock_s, 4),
        "checkpoint_s": round(process.checkpoint_s, 4),
        "restore_s": round(resumed.restore_s, 4),
        "unlock_s": round(resumed.seconds - resumed.restore_s, 4),
        "checkpoint_rate": int(out),
        "restore_rate": int(back),
        "pinned_to_host_rate": int(pinned["to_host"]),
        "pinned_to_device_rate": int(pinned["to_device"]),
        "checkpoint_of_pinned": round(out / pinned["to_host"], 3),
        "restore_of_pinned": round(back / pinned["to_device"], 3),
    }


async def versions(driver: DriverHelper, machine: Machine) -> Report:
    """What everything else is to be read with. ``ok`` says whether the driver can be used."""
    hello = await driver.hello()
    report: Report = {
        "ok": hello["ready"] and bool(machine.gpus),
        "relume": __version__,
        "python": platform.python_version(),
        "kernel": os.uname().release,
        "arch": platform.machine(),
        "driver": machine.driver_version,
        "cuda": cuda_text(machine.cuda_version) if machine.cuda_version else "",
        "gpus": [
            {"model": gpu.model, "uuid": gpu.uuid, "memory_bytes": gpu.memory_bytes} for gpu in machine.gpus
        ],
        "helper_start_s": hello["init_s"],
    }
    missing = _gpu_missing(hello, machine)
    return report if not missing else report | {"ok": None, "missing": missing}


def _gpu_missing(hello: Mapping[str, Any], machine: Machine) -> list[str]:
    missing = [] if machine.gpus else [f"a GPU that NVML shows ({machine.reason})"]
    return missing + _driver_missing(hello)


def _driver_missing(hello: Mapping[str, Any]) -> list[str]:
    return [] if hello["ready"] else [hello["error"]["message"]]


async def check(options: argparse.Namespace, report: Callable[[str, Report], None]) -> None:
    """All steps, each reported as it ends."""
    async with AsyncExitStack() as stack:
        driver = await stack.enter_async_context(DriverHelper())
        machine = await driver.survey()
        hello = await driver.hello()
        missing, no_driver = _gpu_missing(hello, machine), _driver_missing(hello)
        report("versions", await versions(driver, machine))
        size = options.size or _size(machine)

        async def step(name: str, made: Callable[[], Awaitable[Report]]) -> None:
            started = time.monotonic()
            try:
                outcome = await made()
            except Missing as lacking:
                outcome = {"ok": None, "missing": list(lacking.args)}
            except RelumeError as error:
                outcome = {"ok": False, "error": error.as_dict()}
                if os.geteuid() != 0:
                    outcome["try"] = "as root: the driver may ask for the right to trace the process"
            except Exception as error:
                outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            report(name, outcome | {"seconds": round(time.monotonic() - started, 3)})

        def unless(what: list[str], made: Callable[[], Awaitable[Report]]) -> Callable[[], Awaitable[Report]]:
            async def lacking() -> Report:
                raise Missing(*what)

            return lacking if what else made

        # The first two need the driver alone; NVML only says how much they may take.
        await step("plain", unless(no_driver, lambda: round_trip(driver, size, 1, graph=False)))
        await step("graphs", unless(no_driver, lambda: round_trip(driver, size, 96, graph=True)))
        await step("move", unless(missing, lambda: _move(driver, machine, size)))
        for name, paged in (("container", False), ("paged", True)):
            await step(name, partial(_container, driver, machine, size, options.cdi, missing, paged=paged))


async def _move(driver: DriverHelper, machine: Machine, size: int) -> Report:
    lacking = []
    first, others = machine.gpus[0], [gpu for gpu in machine.gpus[1:] if gpu.model == machine.gpus[0].model]
    if not others:
        lacking.append(f"a second {first.model}")
    if int(machine.driver_version.split(".")[0]) < MIN_DRIVER_REMAP:
        lacking.append(f"NVIDIA driver {MIN_DRIVER_REMAP} (this is {machine.driver_version})")
    if lacking:
        raise Missing(*lacking)
    # Every GPU that the process can see has to be named; the first two change places.
    swap = {gpu.uuid: gpu.uuid for gpu in machine.gpus} | {
        first.uuid: others[0].uuid,
        others[0].uuid: first.uuid,
    }
    return {"to": others[0].uuid, **await round_trip(driver, size, 4, graph=True, gpu_map=swap)}


async def _container(
    driver: DriverHelper, machine: Machine, size: int, folders: list[Path], missing: list[str], *, paged: bool
) -> Report:
    lacking, requirements = container_requirements(machine, cdi.load(folders), paged=paged)
    if requirements is None or missing:
        raise Missing(*missing, *lacking)
    return await container_step(driver, requirements, size, paged=paged)


def _size(machine: Machine) -> int:
    """Half of the first GPU's free memory, a quarter of the host's, 8 GiB at most."""
    free = machine.gpus[0].free_bytes if machine.gpus else GIB
    return min(8 * GIB, free // 2, memory.machine().available // 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/gpu-check", description=__doc__)
    parser.add_argument(
        "--size", type=lambda text: int(float(text) * GIB), metavar="GIB", help="device memory to hold"
    )
    parser.add_argument("--cdi", type=Path, action="append", metavar="DIR", help="folders of CDI files")
    parser.add_argument("--fake", action="store_true", help="the driver is the fake one; every line says so")
    options = parser.parse_args()
    options.cdi = options.cdi or list(cdi.FOLDERS)
    verdicts: list[bool | None] = []

    def report(step: str, outcome: Report) -> None:
        verdicts.append(outcome["ok"])
        print(json.dumps({"step": step, **({"fake": True} if options.fake else {}), **outcome}), flush=True)

    asyncio.run(check(options, report))
    sys.exit(1 if False in verdicts else 0 if True in verdicts else 3)


if __name__ == "__main__":
    main()
