"""The node's hold on one keeper: connect to it, ask it, hear from it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relume.engine.jobs import Container, DumpJob, DumpResult, RestoreJob
from relume.errors import EngineError, HostError
from relume.keeper import wire
from relume.keeper.instance import Assignment

log = logging.getLogger(__name__)

SOCKET = "keeper.sock"

OnEvent = Callable[[dict[str, Any]], None]

_END_PATIENCE = 20.0
"""Seconds; a little more than the keeper takes itself."""


class KeeperLost(EngineError):
    """The keeper is gone, and the stdio of its instance with it."""

    code = "keeper_lost"


class Keeper:
    """A connection to one keeper. Events come to ``on_event``; ``lost`` is set when the connection ends."""

    def __init__(self, container: Container, on_event: OnEvent) -> None:
        self.container = container
        self.on_event = on_event
        self.lost = asyncio.Event()
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether it was connected at some time."""
        return self._writer is not None

    async def connect(self, *, patience: float = 10.0) -> dict[str, Any]:
        """Connect, waiting ``patience`` seconds for it to listen; returns what ``hello`` tells.

        Raises KeeperLost when there is none, OSError when it cannot be seen whether there is.
        """
        path = Path(self.container.runtime) / SOCKET
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(path, limit=wire.LINE_LIMIT)
                break
            except OSError as error:
                if asyncio.get_running_loop().time() >= deadline:
                    if not isinstance(error, FileNotFoundError | ConnectionRefusedError):
                        raise
                    raise KeeperLost(
                        f"the keeper of {self.container.instance_id} does not answer: {error}",
                        hint=f"its last words are in {path.with_name('keeper.log')}",
                    ) from None
                await asyncio.sleep(0.01)
        self._reading = asyncio.create_task(self._read(reader))
        return await self.ask("hello")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (message := await wire.receive(reader)) is not None:
                if "event" in message:
                    self._hear(message)
                elif (future := self._replies.pop(message["seq"], None)) is not None and not future.done():
                    future.set_result(message)
        finally:
            self.lost.set()
            for future in self._replies.values():
                if not future.done():
                    future.set_exception(KeeperLost(f"the keeper of {self.container.instance_id} is gone"))
            self._replies.clear()

    def _hear(self, event: dict[str, Any]) -> None:
        try:
            self.on_event(event)
        except Exception:  # a fault of the node's must not make it deaf to its instance
            log.exception("%s of %s", event["event"], self.container.instance_id)

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One operation; raises HostError where the machine lacks something, else EngineError, or KeeperLost."""
        if self._writer is None or self.lost.is_set():
            raise KeeperLost(f"the keeper of {self.container.instance_id} is gone")
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        wire.send(self._writer, {"seq": number, "op": op, **arguments})
        reply = await future
        if "error" in reply:
            error = dict(reply["error"])
            kind = HostError if error["code"] == HostError.code else EngineError
            raise kind(error["message"], hint=error["hint"])
        result: dict[str, Any] = reply["ok"]
        return result

    async def assign(self, assignment: Assignment) -> int:
        """Give it an app; returns the published port."""
        return int((await self.ask("assign", assignment=dataclasses.asdict(assignment)))["port"])

    async def boot(self) -> dict[str, Any]:
        return await self.ask("boot")

    async def restore(self, job: RestoreJob) -> dict[str, Any]:
        return await self.ask("restore", job=dataclasses.asdict(job))

    async def resume(
        self, environment: dict[str, str], given: dict[str, str], first_line: str, stopped: Sequence[int]
    ) -> None:
        """Let a prepared instance run."""
        await self.ask(
            "resume", environment=environment, given=given, first_line=first_line, stopped=list(stopped)
        )

    async def dump(self, job: DumpJob) -> DumpResult:
        """Dump; the result says whether it worked."""
        return dump_result(await self.ask("dump", job=dataclasses.asdict(job)))

    async def dumped(self, dump_id: str) -> DumpResult | None:
        """The result of a dump that was asked for earlier, once it is there; None if the last was another."""
        raw = await self.ask("dumped", dump_id=dump_id)
        return dump_result(raw) if raw else None

    async def answer(self, request: int, status: int, body: Any) -> None:
        await self.ask("answer", request=request, status=status, body=body)

    async def note(self, line: str) -> None:
        """Write a line of relume's own into the instance's log."""
        await self.ask("note", line=line)

    async def signal(self, number: int) -> None:
        await self.ask("signal", number=number)

    async def end(self) -> None:
        """End the container, or the coming of it, and the keeper. One that hangs is left to find out by itself."""
        with contextlib.suppress(EngineError, HostError, TimeoutError):
            async with asyncio.timeout(_END_PATIENCE):
                await self.ask("end")
                await self.lost.wait()

    async def close(self) -> None:
        """Drop the connection only."""
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()


def dump_result(raw: dict[str, Any]) -> DumpResult:
    """A DumpResult from its JSON, whatever else is beside it."""
    names = {field.name for field in dataclasses.fields(DumpResult)}
    return DumpResult(**{key: value for key, value in raw.items() if key in names})
