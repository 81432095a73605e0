"""The node's end of the helper: the driver's calls as coroutines, each with a deadline.

One helper serves the whole node. It starts at the first call, and again at the first call after it died. A call
that gets no answer by its deadline is taken to be stuck in the driver: the helper is killed, every call in flight
fails with GpuTimeout or GpuUnavailable, and the next call has a fresh one. What the driver did with the process is then
unknown; ``story`` asks for its state and goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from relume.errors import GpuDriverTooOld, GpuTimeout, GpuUnavailable
from relume.gpu.driver import DriverError, ProcessState
from relume.gpu.nvml import Machine

START_TIMEOUT_S: Final = 60.0
"""cuInit: 2.7 s were seen on a machine with eight GPUs; a GPU without persistence mode wakes up slower."""
QUERY_TIMEOUT_S: Final = 10.0
UNLOCK_TIMEOUT_S: Final = 30.0
LOCK_GRACE_S: Final = 2.0
"""What a driver gets on top of the lock's time-out, which it keeps itself."""


class AsyncGpuDriver(Protocol):
    """What the stories need: the driver's calls by pid. Raise DriverError, GpuTimeout and GpuUnavailable."""

    async def survey(self) -> Machine: ...

    async def state(self, pid: int) -> ProcessState: ...

    async def restore_thread_id(self, pid: int) -> int: ...

    async def lock(self, pid: int, timeout_s: float) -> None: ...

    async def checkpoint(self, pid: int, timeout_s: float) -> None: ...

    async def restore(self, pid: int, gpu_map: Mapping[str, str], timeout_s: float) -> None: ...

    async def unlock(self, pid: int) -> None: ...


@dataclass(slots=True)
class _Running:
    """One helper process, its socket, and the calls it has not answered."""

    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    pending: dict[int, asyncio.Future[Any]]
    reading: asyncio.Task[None]
    hello: dict[str, Any]


class DriverHelper:
    """Starts, calls and replaces the helper process. Use as ``async with``, or ``close`` it.

    ``env`` replaces the helper's environment; the tests use it to point the dynamic loader at a driver of theirs.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        # The node's own GPUs are all of the machine's, whatever the shell that started it was told to see.
        given = os.environ if env is None else env
        self._env = {name: value for name, value in given.items() if name != "CUDA_VISIBLE_DEVICES"}
        self._running: _Running | None = None
        self._starting = asyncio.Lock()
        self._last_id = 0

    async def __aenter__(self) -> DriverHelper:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pid(self) -> int | None:
        """The helper's process id, None while there is none."""
        return self._running.process.pid if self._running else None

    async def hello(self) -> dict[str, Any]:
        """The helper's first line (see ``helper``): whether the driver is usable, and its CUDA version."""
        return (await self._ensure()).hello

    async def survey(self) -> Machine:
        return Machine.from_dict(await self._call("survey", {}, QUERY_TIMEOUT_S))

    async def state(self, pid: int) -> ProcessState:
        return ProcessState(await self._driver_call("state", {"pid": pid}, QUERY_TIMEOUT_S))

    async def restore_thread_id(self, pid: int) -> int:
        return int(await self._driver_call("restore_thread_id", {"pid": pid}, QUERY_TIMEOUT_S))

    async def lock(self, pid: int, timeout_s: float) -> None:
        args = {"pid": pid, "timeout_ms": max(1, int(timeout_s * 1000))}
        await self._driver_call("lock", args, timeout_s + LOCK_GRACE_S)

    async def checkpoint(self, pid: int, timeout_s: float) -> None:
        await self._driver_call("checkpoint", {"pid": pid}, timeout_s)

    async def restore(self, pid: int, gpu_map: Mapping[str, str], timeout_s: float) -> None:
        await self._driver_call("restore", {"pid": pid, "gpu_map": dict(gpu_map)}, timeout_s)

    async def unlock(self, pid: int) -> None:
        await self._driver_call("unlock", {"pid": pid}, UNLOCK_TIMEOUT_S)

    async def close(self) -> None:
        """End the helper. Safe to call twice."""
        if self._running is not None:
            await self._end(self._running)

    async def _driver_call(self, call: str, args: dict[str, Any], timeout_s: float) -> Any:
        running = await self._ensure()
        if not running.hello["ready"]:
            await self._end(running)  # what was missing may be there by the next call
            error = dict(running.hello["error"])
            kind = GpuDriverTooOld if error.pop("code") == GpuDriverTooOld.code else GpuUnavailable
            raise kind(error.pop("message"), **error)
        return await self._call(call, args, timeout_s)

    async def _call(self, call: str, args: dict[str, Any], timeout_s: float) -> Any:
        running = await self._ensure()
        self._last_id += 1
        call_id = self._last_id
        answer = asyncio.get_running_loop().create_future()
        running.pending[call_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                running.writer.write(json.dumps({"id": call_id, "call": call, "args": args}).encode() + b"\n")
                return await answer
        except TimeoutError:
            await self._end(running)
            raise GpuTimeout(
                f"the CUDA driver did not answer {call} for process {args.get('pid')} within {timeout_s:g} s",
                hint="work on the GPU that never ends, or a hanging driver: see `nvidia-smi` and the kernel log",
                call=call,
                pid=args.get("pid"),
            ) from None
        finally:
            running.pending.pop(call_id, None)

    async def _ensure(self) -> _Running:
        async with self._starting:
            if self._running is None:
                self._running = await self._start()
            return self._running

    async def _start(self) -> _Running:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "relume.gpu.helper",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=self._env,
                start_new_session=True,  # a Ctrl+C at the terminal is the node's to handle
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                line = await reader.readline()
        except TimeoutError:
            line = b""
        if not line:
            writer.close()
            await _reap(process)
            raise GpuUnavailable(
                f"the CUDA driver's helper process did not start (exit status {process.returncode})",
                hint=f"run `{sys.executable} -m relume.gpu.helper 1` to see why",
            )
        pending: dict[int, asyncio.Future[Any]] = {}
        reading = asyncio.create_task(self._read(reader, pending, process), name="gpu-helper")
        return _Running(process, writer, pending, reading, json.loads(line))

    async def _read(
        self,
        reader: asyncio.StreamReader,
        pending: dict[int, asyncio.Future[Any]],
        process: asyncio.subprocess.Process,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                message = json.loads(line)
                answer = pending.get(message["id"])
                if answer is None or answer.done():
                    continue
                if "error" in message:
                    answer.set_exception(DriverError(**message["error"]))
                else:
                    answer.set_result(message["result"])
        running = self._running
        if running is not None and running.process is process:
            self._running = None
            running.writer.close()
        status = await process.wait()
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(
                    GpuUnavailable(
                        f"the CUDA driver's helper process ended in the middle of a call (exit status {status})",
                        hint="the kernel log says what the driver did; the next call starts a new helper",
                    )
                )

    async def _end(self, running: _Running) -> None:
        if self._running is running:
            self._running = None
        running.writer.close()
        # Closing is enough for a healthy helper; one that is stuck in the driver needs the signal, and one that is
        # stuck in the kernel needs more than we have, so nobody waits long for it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await asyncio.shield(running.reading)


async def _reap(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
