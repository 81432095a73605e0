"""A sidecar on a loopback socket of its own, with handlers that a test holds in its hand."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from relume.sidecar import Answer, Limits, Sidecar


@dataclasses.dataclass(slots=True)
class Served:
    """A running sidecar. ``gate`` holds every checkpoint back until it is set; ``complaints`` are asyncio's."""

    sidecar: Sidecar
    port: int
    gate: asyncio.Event
    asked: int = 0
    finished: int = 0
    complaints: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what callers bring about; 5 s at most."""
        for _ in range(500):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come to be")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def exchange(self, request: bytes) -> bytes:
        """Send ``request``, say no more, and return everything that comes back."""
        reader, writer = await self.connect()
        writer.write(request)
        writer.write_eof()
        try:
            return await reader.read()
        finally:
            writer.close()


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """``await serve(**limits)`` gives a :class:`Served`; the test fails if asyncio had to report an error."""
    running: list[Served] = []

    async def make(**limits: Any) -> Served:
        gate = asyncio.Event()
        gate.set()

        async def checkpoint() -> Answer:
            served.asked += 1
            await gate.wait()
            served.finished += 1
            return Answer(200, {"status": "created"})

        async def status() -> Answer:
            return Answer(200, {"app": "a"})

        async def env() -> Answer:
            raise RuntimeError("the value of a secret")

        listener = socket.create_server(("127.0.0.1", 0))
        sidecar = Sidecar(checkpoint=checkpoint, status=status, env=env, limits=Limits(**limits))
        served = Served(sidecar, listener.getsockname()[1], gate)
        asyncio.get_running_loop().set_exception_handler(lambda _, context: served.complaints.append(context))
        await sidecar.open(listener)
        running.append(served)
        return served

    yield make
    for served in running:
        await served.sidecar.close()
        assert not served.complaints
