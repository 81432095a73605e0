"""A small node: the API's routes on a unix socket, by the same HTTP server as the real one, with canned answers."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from relume.cli.main import main

INSTANCE = {
    "instance_id": "i-1",
    "app": "hello",
    "build_id": "b-1",
    "state": "ready",
    "restored": True,
    "url": "http://127.0.0.1:1",
    "memory_bytes": 123_456_789,
    "started_at": 1_760_000_000.0,
}
STARTED = {
    "instance_id": "i-1",
    "app": "hello",
    "build_id": "b-1",
    "restored": True,
    "checkpoint_id": "cp-1",
    "reason": None,
    "url": "http://127.0.0.1:1",
    "ready_s": 0.1842,
    "trace": {"lookup": 0.0004, "criu": 0.09},
}
CHECKPOINT = {
    "checkpoint_id": "cp-1",
    "app": "hello",
    "build_id": "b-1",
    "state": "ready",
    "where": ["local", "remote"],
    "size_bytes": 1_500_000_000,
    "created_at": 1_760_000_000.0,
}


class FakeNode:
    """Records what it is asked as ``calls``; ``answers`` replaces the answer to "METHOD /path"."""

    def __init__(self, socket_path: Path) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.answers: dict[str, Callable[[web.Request], Any]] = {}
        self._path = socket_path
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._live)

    def __enter__(self) -> FakeNode:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def refuse(self, route: str, status: int, **error: Any) -> None:
        """Answer ``route`` with an error object."""
        self.answers[route] = lambda _: web.json_response({"error": error}, status=status)

    def lines(self, route: str, *lines: dict[str, Any]) -> None:
        """Answer ``route`` with a stream of JSON lines."""
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()

        async def stream(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for at in range(0, len(body), 7):  # cut anywhere
                await response.write(body[at : at + 7])
            return response

        self.answers[route] = stream

    def _live(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(self._path)).start()
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.calls.append((request.method, request.raw_path, json.loads(raw) if raw else None))
        made = self.answers[f"{request.method} {request.path}"](request)
        answer = await made if asyncio.iscoroutine(made) else made
        return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state"
    path.mkdir()
    monkeypatch.setenv("RELUME_STATE", str(path))
    return path


@pytest.fixture
def node(state: Path) -> Iterator[FakeNode]:
    with FakeNode(state / "node.sock") as made:
        made.answers |= {
            "GET /v1/status": lambda _: {"node_id": "n-1", "instances": 1},
            "GET /v1/instances": lambda _: [INSTANCE],
            "GET /v1/apps": lambda _: [{"app": "hello", "build_id": "b-1", "instances": 1}],
            "GET /v1/checkpoints": lambda _: [CHECKPOINT],
            "GET /v1/checkpoints/cp-1": lambda _: (
                CHECKPOINT
                | {
                    "processes": [{"pid": 1, "name": "python3", "memory_bytes": 5_000_000}],
                    "mappings": [{"pid": 1, "what": "[heap]", "saved_bytes": 4_000_000}],
                    "region": {"shared_percent": 95.0},
                }
            ),
            "POST /v1/checkpoints/cp-1/verify": lambda _: {"checkpoint_id": "cp-1", "ok": True},
            "DELETE /v1/checkpoints/cp-1": lambda _: {"removed": "cp-1"},
            "DELETE /v1/apps/hello": lambda _: {"removed": "hello"},
            "POST /v1/stop": lambda _: {"stopped": ["i-1"]},
            "POST /v1/instances/i-1/explain": lambda _: {"would_work": True, "size_bytes": 5_000_000},
            "GET /v1/secrets/hello": lambda _: ["A", "B"],
            "PUT /v1/secrets/hello": lambda _: ["A"],
            "DELETE /v1/secrets/hello": lambda _: {"removed": "A"},
        }
        made.lines("POST /v1/apps/hello/start", {"progress": "restoring cp-1"}, {"result": STARTED})
        built = {
            "app": "hello",
            "build_id": "b-1",
            "how": "built",
            "in_region": False,
            "reason": "it is away",
            "seconds": 12.34,
        }
        made.lines(
            "POST /v1/deploy",
            {"progress": "Loaded 3 files"},
            {"progress": "  pip: numpy"},
            {"progress": "Built app"},
            {"result": built},
        )
        yield made


class Ran:
    """What a command did: its exit status and what it wrote."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def relume(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: str | os.PathLike[str]) -> Ran:
        status = main([os.fspath(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ran(status, captured.out, captured.err)

    return run
