"""The keeper's side of the socket: one operation a line, carried out on its :class:`Instance`.

A keeper without an app ends with the node that started it; one with an app stays until the app has ended and
the exit status is on disk.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from relume.engine.jobs import Container, DumpJob, RestoreJob
from relume.errors import BadRequest, RelumeError
from relume.keeper import wire
from relume.keeper.instance import Assignment, Instance
from relume.sidecar import Answer

_GRACE_AFTER_EXIT = 10.0
"""How long, in seconds, a keeper stays to tell a connected node of the end before it goes."""

_GRACE_BEFORE_NODE = 60.0
"""How long, in seconds, a keeper waits for the node that started it: that may have died at once."""


class Server:
    """Serves one instance on one unix socket."""

    def __init__(self, container: Container, socket_path: Path) -> None:
        self._instance = Instance(container, self._notify)
        self._path = socket_path
        self._writer: asyncio.StreamWriter | None = None
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the instance is over or, before it has an app, until the node is gone."""
        server = await asyncio.start_unix_server(self._connected, self._path, limit=wire.LINE_LIMIT)
        self._path.chmod(0o600)
        asyncio.get_running_loop().call_later(_GRACE_BEFORE_NODE, self._leave_unless_wanted)
        await self._instance.warm_up()
        await self._over.wait()
        server.close()
        if self._writer is not None:
            self._writer.close()

    def _leave_unless_wanted(self) -> None:
        if self._writer is None and self._instance.phase == "spare":
            self._over.set()

    def _notify(self, event: dict[str, Any]) -> None:
        if self._writer is not None:
            wire.send(self._writer, event)
        if event.get("event") == "exit":
            asyncio.get_running_loop().call_later(_GRACE_AFTER_EXIT, self._over.set)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while (message := await wire.receive(reader)) is not None:
            task = asyncio.create_task(self._carry_out(message, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if self._writer is writer:
            self._writer = None
            if self._instance.phase in ("spare", "failed", "exited"):
                self._over.set()
        writer.close()

    async def _carry_out(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            reply: dict[str, Any] = {"ok": await self._operation(message)}
        except RelumeError as error:
            reply = {"error": error.as_dict()}
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
                instance.resume(message["environment"], message["first_line"], message["stopped"])
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
                self._over.set()
                return {}
            case other:
                raise BadRequest(f"no operation {other!r}")
