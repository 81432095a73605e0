"""A sidecar for the SDK to talk to: real HTTP on loopback, and a container that can be "restored".

A restore cannot be had without CRIU, but all a process sees of one is this: its connection ends without an
answer, and the sidecar then tells another ``restore_id``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from relume.guest.sdk.relume import _checkpoint, _environment, _sidecar


class Sidecar:
    """What the endpoint says, and what it does on POST /checkpoint (``on_post``; None cuts the connection)."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {
            "instance_id": "i-1",
            "restored": False,
            "restore_id": None,
            "checkpoint_id": None,
        }
        self.env: dict[str, str] = {"GREETING": "hello"}
        self.posts = 0
        self.on_post: Callable[[], dict[str, Any] | None] = lambda: {
            "status": "created",
            "reason": None,
            "checkpoint_id": "c-1",
        }

    def restore(self, restore_id: str = "r-1", **env: str) -> None:
        self.status.update(restored=True, restore_id=restore_id, checkpoint_id="c-1")
        self.env = {**self.env, **env}


@pytest.fixture
def sidecar(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sidecar]:
    state = Sidecar()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({"/status": state.status, "/env": state.env}[self.path])

        def do_POST(self) -> None:
            state.posts += 1
            answer = state.on_post()
            if answer is not None:
                self._answer(answer)

        def _answer(self, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setattr(_sidecar, "ADDRESS", server.server_address)
    monkeypatch.setattr(_checkpoint, "_before", [])
    monkeypatch.setattr(_checkpoint, "_after", [])
    monkeypatch.setattr(_checkpoint, "_handled", None)
    monkeypatch.setattr(_environment, "_given", set())
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
