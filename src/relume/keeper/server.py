"""The keeper's side of the socket: one operation a line, carried out on its :class:`Instance`.

A keeper without a container ends with the node that started it; one with a container stays until that has
ended and the exit status is on disk. One that nobody can reach any more, because its directory is gone, ends
its container and itself: what nobody can stop must not run.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from relume.engine.jobs import Container, DumpJob, RestoreJob
from relume.engine.paging import PagerProcess
from relume.errors import SHORTAGES, BadRequest, EngineError, HostError, RelumeError
from relume.keeper import wire
from relume.keeper.instance import Assignment, Instance
from relume.sidecar import Answer

_USELESS = frozenset({"spare", "assigned", "failed", "exited"})
"""The phases in which there is no container to hold."""

_GRACE = 10.0
"""How long, in seconds, a keeper without a container waits for a node before it goes."""

_LOOK_AROUND = 5.0
"""Seconds between two looks whether anybody can still want something of us."""


class Server:
    """Serves one instance on one unix socket."""

    def __init__(self, container: Container, socket_path: Path, pager: PagerProcess | None = None) -> None:
        """``pager`` waits for its job, should the instance be a copy."""
        self._instance = Instance(container, self._notify, pager)
        self._path = socket_path
        self._writer: asyncio.StreamWriter | None = None
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the instance is over or, before it has a container, until the node is gone."""
        server = await asyncio.start_unix_server(self._connected, self._path, limit=wire.LINE_LIMIT)
        self._path.chmod(0o600)
        alone = 0.0
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), _LOOK_AROUND)
            if not self._path.exists():
                await self._instance.end()
                break
            if not self._instance.recorded:
                self._instance.record()
            unwanted = self._writer is None or self._instance.phase == "exited"
            alone = alone + _LOOK_AROUND if unwanted and self._useless() else 0.0
            if alone >= _GRACE:
                break
        server.close()
        if self._writer is not None:
            self._writer.close()
        await self._instance.close()

    def _useless(self) -> bool:
        """Whether there is no container to hold, nor the knowledge how it ended."""
        return self._instance.phase in _USELESS and self._instance.recorded

    def _notify(self, event: dict[str, Any]) -> None:
        if self._writer is not None:
            wire.send(self._writer, event)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while (message := await wire.receive(reader)) is not None:
            task = asyncio.create_task(self._carry_out(message, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(0)  # an operation that came last has begun by now, and may have changed the phase
        if self._writer is writer:
            self._writer = None
            if self._useless():
                self._over.set()
        writer.close()

    async def _carry_out(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            reply: dict[str, Any] = {"ok": await self._operation(message)}
        except RelumeError as error:
            reply = {"error": error.as_dict()}
        except OSError as error:
            kind = HostError if error.errno in SHORTAGES else EngineError
            reply = {"error": kind(str(error) or type(error).__name__).as_dict()}
        except Exception as error:
            reply = {"error": {"code": "keeper", "message": f"{type(error).__name__}: {error}", "hint": ""}}
        wire.send(writer, {"seq": message.get("seq"), **reply})

    async def _operation(self, message: dict[str, Any]) -> dict[str, Any]:
        instance = self._instance
        match message["op"]:
            case "hello":
                return instance.facts()
            case "assign":
                return {"port": await instance.assign(Assignment(**message["assignment"]))}
            case "boot":
                return await instance.boot()
            case "restore":
                return await instance.restore(RestoreJob(**message["job"]))
            case "resume":
                instance.resume(
                    message["environment"], message["given"], message["first_line"], message["stopped"]
                )
                return {}
            case "dump":
                return await instance.make_dump(DumpJob(**message["job"]))
            case "dumped":
                return await instance.dumped(message["dump_id"])
            case "answer":
                instance.answer(message["request"], Answer(message["status"], message["body"]))
                return {}
            case "note":
                instance.note(message["line"])
                return {}
            case "signal":
                instance.signal(message["number"])
                return {}
            case "end":
                await instance.end()
                self._over.set()
                return {}
            case other:
                raise BadRequest(f"no operation {other!r}")
