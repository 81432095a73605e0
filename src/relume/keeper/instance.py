"""One instance, as its keeper holds it: the engine, the log, the sidecar, the published port, the probe.

Every public coroutine is one operation of the node (see :mod:`relume.keeper.server`). What happens without
being asked (a request of the app, its readiness, its end) goes out through ``notify``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relume.engine.criu import Criu
from relume.engine.jobs import Container, DumpJob, RestoreJob
from relume.engine.paging import PagerProcess
from relume.errors import Conflict, EngineError
from relume.keeper import probe
from relume.keeper.log import RELUME, Log
from relume.keeper.publish import PublishedPort
from relume.linux import netns
from relume.sidecar import Answer, Sidecar

Notify = Callable[[dict[str, Any]], None]

_END_PATIENCE = 15.0


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """What a keeper is told when its instance gets an app. Paths are absolute; ``environment`` is secret."""

    app: str
    build_id: str
    checkpointing: bool
    restored: bool
    checkpoint_id: str | None
    environment: dict[str, str]
    port: int
    readycheck: str
    """HTTP path of the readiness check; empty probes the port."""
    log: str
    log_limit: int
    exit_file: str
    id_base: int
    first_line: str = ""
    given: dict[str, str] = dataclasses.field(default_factory=dict)
    """The part of ``environment`` that came from whoever started it; kept for a node that adopts it."""


class Instance:
    """Holds one container from before its first instruction to after its last."""

    def __init__(self, container: Container, notify: Notify, pager: PagerProcess | None = None) -> None:
        self._container = container
        self._notify = notify
        self._engine = Criu(container, sink=self._printed, on_network=self._network_up, pager=pager)
        self._sidecar = Sidecar(checkpoint=self._checkpoint, status=self._status, env=self._env)
        self.published = PublishedPort(self._dial, self._responded)
        self._assignment: Assignment | None = None
        self._log: Log | None = None
        self._requests: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = itertools.count(1)
        self._frozen = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._answered = False
        self._held_back = False
        self._stopped = False
        self.phase = "spare"
        self.ready_at: float | None = None
        self.exit_code: int | None = None
        self.dump: dict[str, Any] | None = None
        self.paging: dict[str, Any] | None = None
        self.recorded = True
        """Whether how it ended is on disk, if it has ended."""
        self.over = asyncio.Event()

    # --- what the node asks -----------------------------------------------------------------------

    async def assign(self, assignment: Assignment) -> int:
        """Take an app; returns the published port on 127.0.0.1."""
        if self._assignment is not None:
            raise Conflict(f"instance {self._container.instance_id} already has an app")
        self._assignment = assignment
        self._log = Log(Path(assignment.log), limit=assignment.log_limit)
        if assignment.first_line:
            self._log.write(assignment.first_line.encode() + b"\n", RELUME)
        self._engine.owner = assignment.id_base
        await self.published.open()
        self.phase = "assigned"
        return self.published.port

    async def boot(self) -> dict[str, Any]:
        """Boot the container; returns its pid and the times of the stages."""
        return await self._bring_up(self._engine.boot())

    async def restore(self, job: RestoreJob) -> dict[str, Any]:
        """Restore the container; returns its pid and the times of the stages."""
        if job.pager is not None:
            assert self._engine.pager is not None
            self._engine.pager.on_event = self._pager_told
        self._stopped = job.stopped
        self._held_back = True  # its sockets accept before its processes run: that is not an answer
        told = await self._bring_up(self._engine.restore(job))
        if job.stopped:
            self.phase = "prepared"
        else:
            self._let_probe()
        return told

    def resume(
        self, environment: dict[str, str], given: dict[str, str], first_line: str, stopped: list[int]
    ) -> None:
        """Let a prepared instance run, as an instance of now: environment, first line of the log, clock."""
        if self.phase != "prepared" or self._assignment is None or self._log is None:
            raise Conflict(f"{self._container.instance_id} is {self.phase}, not prepared")
        self._assignment = dataclasses.replace(self._assignment, environment=environment, given=given)
        self._log.write(first_line.encode() + b"\n", RELUME)
        self.phase = "starting"
        self._stopped = False
        self._engine.resume(stopped)
        self._let_probe()

    def _let_probe(self) -> None:
        """CRIU is done (or was never needed): from now on an answer is the app's."""
        if self._held_back:
            self._held_back = False
            self._spawn(self._watch_readiness())

    async def _bring_up(self, coming: Any) -> dict[str, Any]:
        self.phase = "starting"
        try:
            pid = await coming
        except BaseException as error:
            self.phase = "failed"
            await self._engine.close()
            self._notify({"event": "failed", "message": str(error)})
            self.over.set()
            raise
        self._spawn(self._watch_end())
        return {"pid": pid, "timeline": self._engine.timeline}

    async def make_dump(self, job: DumpJob) -> dict[str, Any]:
        """Dump the running container. The result stays readable by ``hello`` until the next dump."""
        async with self._frozen:
            self.published.hold()
            known = {"dump_id": job.dump_id, "requests": sorted(self._requests)}
            self.dump = known | {"running": True}
            try:
                result = dataclasses.asdict(await self._engine.dump(job))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}"}
            finally:
                self.published.resume()
            self.dump = result | known | {"running": False}
            return self.dump

    async def dumped(self, dump_id: str) -> dict[str, Any]:
        """The result of the last dump, once it is over; empty if that was not ``dump_id``."""
        async with self._frozen:
            return self.dump if self.dump is not None and self.dump["dump_id"] == dump_id else {}

    def answer(self, request: int, answer: Answer) -> None:
        """Answer a request of the app that waits; one that hung up meanwhile is no error."""
        future = self._requests.pop(request, None)
        if future is not None and not future.done():
            future.set_result(answer)

    def note(self, line: str) -> None:
        """Write a line of relume's own into the log."""
        if self._log is not None:
            self._log.write(line.encode() + b"\n", RELUME)

    def signal(self, number: int) -> None:
        """Send a signal to the container's init."""
        if self._engine.pid and self.exit_code is None:
            os.kill(self._engine.pid, number)

    async def end(self) -> None:
        """End the container, or the coming of it; returns when it is over and no dump of it is going on.

        Within 15 s: what does not die of SIGKILL by then hangs in the kernel.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_PATIENCE):
                if self.phase in ("starting", "prepared", "ready"):
                    await self._engine.kill()
                    await self.over.wait()
                async with self._frozen:
                    pass

    async def close(self) -> None:
        """End what was forked with us and never needed; it would be a zombie of whoever adopts orphans."""
        await self._engine.drop_pager()

    def facts(self) -> dict[str, Any]:
        """Everything a node that has just (re)connected must know."""
        return {
            "instance_id": self._container.instance_id,
            "phase": self.phase,
            "stopped": self._stopped,
            "pid": self._engine.pid,
            "port": self.published.port,
            "ready_at": self.ready_at,
            "exit_code": self.exit_code,
            "requests": sorted(self._requests),
            "dump": self.dump,
            "paging": self.paging,
            "given": self._assignment.given if self._assignment is not None else {},
        }

    # --- what happens by itself -------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _printed(self, data: bytes, stream: str) -> None:
        if self._log is not None:
            self._log.write(data, stream)

    async def _network_up(self, listener: socket.socket) -> None:
        await self._sidecar.open(listener)
        if not self._held_back:
            self._spawn(self._watch_readiness())

    async def _dial(self) -> socket.socket:
        """A connection to the app's port, made inside; 127.0.0.1 first, then ::1."""
        assert self._assignment is not None
        network = self._engine.network
        if network is None:
            raise ConnectionRefusedError
        loop = asyncio.get_running_loop()
        refused: OSError = ConnectionRefusedError()
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            made = network.inside.run(lambda family=family: netns.stream_socket(family))  # type: ignore[misc]
            try:
                await loop.sock_connect(made, (address, self._assignment.port))
                return made
            except OSError as error:
                made.close()
                refused = error
            except BaseException:  # called off, and not to lie in a queue of the app's
                made.close()
                raise
        raise refused

    async def _watch_readiness(self) -> None:
        assignment = self._assignment
        assert assignment is not None
        pause = probe.Pause()
        while self.ready_at is None:
            async with self._frozen:
                ready = await self._probe_once(assignment)
            if not ready:
                await pause()
                continue
            self.ready_at = time.time()
            self.phase = "ready"
            self._notify({"event": "ready", "at": time.monotonic(), "timeline": self._engine.timeline})

    async def _probe_once(self, assignment: Assignment) -> bool:
        try:
            async with asyncio.timeout(probe.PATIENCE):  # with its queue full an app lets us wait two minutes
                connection = await self._dial()
        except OSError:
            return False
        if not assignment.readycheck:
            connection.close()
            return True
        return await probe.answers(connection, assignment.readycheck, assignment.app)

    def _pager_told(self, event: dict[str, Any]) -> None:
        if event["event"] in ("restored", "replayed"):
            self._engine.timeline[f"pager_{event['event']}"] = time.monotonic()
        if event["event"] == "restored" and self.phase == "starting" and not self._stopped:
            self._let_probe()
        self.paging = event
        self._notify({"event": "pager", "told": event})

    def _responded(self) -> None:
        if not self._answered and self.ready_at is not None:
            self._answered = True
            if self._engine.pager is not None:
                self._engine.pager.first_answer()
            self._notify({"event": "first_answer", "at": time.monotonic()})

    def record(self) -> None:
        """Write down how it ended; after a full disk this may have to be done again."""
        assert self._assignment is not None
        self.recorded = _write_durably(
            Path(self._assignment.exit_file), {"exit_code": self.exit_code, "at": time.time()}
        )

    async def _watch_end(self) -> None:
        code = await self._engine.ended()
        self.exit_code = code
        self.phase = "exited"
        self.record()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        await self._sidecar.close()
        await self.published.close()
        await self._engine.close()
        self._notify({"event": "exit", "exit_code": code})
        self.over.set()

    # --- what the app asks ------------------------------------------------------------------------

    async def _checkpoint(self) -> Answer:
        number = next(self._numbers)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._requests[number] = future
        self._notify({"event": "request", "request": number})
        # Shielded: the app hanging up must not take the checkpoint down, and cancels this coroutine only.
        return await asyncio.shield(future)

    async def _status(self) -> Answer:
        assignment = self._assignment
        if assignment is None:
            raise EngineError("no app yet")
        return Answer(
            200,
            {
                "instance_id": self._container.instance_id,
                "app": assignment.app,
                "build_id": assignment.build_id,
                "restored": assignment.restored,
                "restore_id": self._container.instance_id if assignment.restored else None,
                "checkpoint_id": assignment.checkpoint_id,
                "checkpointing": assignment.checkpointing,
            },
        )

    async def _env(self) -> Answer:
        return Answer(200, self._assignment.environment if self._assignment is not None else {})


def read_exit_code(path: Path) -> int | None:
    """What a keeper wrote to its exit file; None if it did not come to that."""
    try:
        return int(json.loads(path.read_text())["exit_code"])
    except (OSError, ValueError, KeyError):
        return None


def _write_durably(path: Path, content: dict[str, Any]) -> bool:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except FileNotFoundError:
        return True  # the instance was forgotten with its folder: there is nobody to read it
    except OSError:  # a full disk
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True
