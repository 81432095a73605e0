"""Real object stores on loopback for the store's tests, and a proxy that makes them misbehave."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from relume.cli.benchmark.server import free_port, running

PROGRAMS = Path(sys.executable).parent
USER, PASSWORD = "relume-test", "relume-test-secret"


def url(endpoint: str, bucket: str = "bucket", prefix: str = "region") -> str:
    return f"s3://{bucket}/{prefix}?endpoint={endpoint}&path_style=true&region=us-east-1"


@contextmanager
def localbucket(root: Path) -> Iterator[str]:
    (root / "localbucket" / "bucket").mkdir(parents=True)
    port = free_port()
    command = [PROGRAMS / "localbucket", "--port", str(port), root / "localbucket"]
    with running(command, port, root / "localbucket.log") as endpoint:
        yield endpoint


@contextmanager
def moto(root: Path) -> Iterator[str]:
    port = free_port()
    command = [PROGRAMS / "moto_server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port, root / "moto.log") as endpoint:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "PUT", "/bucket", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=x/y/us-east-1/s3/z"}
        )
        assert connection.getresponse().status == 200
        connection.close()
        yield endpoint


@contextmanager
def juicefs_gateway(root: Path) -> Iterator[str]:
    """The S3 server that takes If-None-Match and overwrites all the same. Its bucket is `jfs`."""
    meta = f"sqlite3://{root}/jfs.db"
    program = PROGRAMS / "juicefs"
    home = {"HOME": str(root)}  # it keeps a cache and a log there
    subprocess.run(
        [program, "format", "--storage", "file", "--bucket", root / "jfs", meta, "jfs"],
        check=True,
        capture_output=True,
        env=os.environ | home,
    )
    port = free_port()
    options = ["--no-usage-report", "--log", root / "jfs-gateway.log", "--cache-dir", root / "jfs-cache"]
    command: list[str | Path] = [program, "gateway", *options, meta, f"127.0.0.1:{port}"]
    secrets = {"MINIO_ROOT_USER": USER, "MINIO_ROOT_PASSWORD": PASSWORD}
    with running(command, port, root / "jfs.log", **home, **secrets) as endpoint:
        wait_for_bucket(port)
        yield endpoint


def wait_for_bucket(port: int) -> None:
    """The gateway accepts before it is ready to answer."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/minio/health/live")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise AssertionError("the gateway did not become ready")


class FaultProxy:
    """Forwards HTTP to `upstream`, and does `fault` to every `every`-th request, if `only` says so of its path.

    Faults: `latency`, `500`, `503`, `reset` (in the middle of the answer's body), `reset-request` (of the request's),
    `truncate` (the answer ends early, politely), `slow` (a trickle), `lost-answer` (the request is done, its answer is
    not given), `outage` (every connection is refused with a reset).
    """

    def __init__(self, upstream: str) -> None:
        self.fault = ""
        self.every = 3
        self.only: Callable[[str], bool] = lambda path: True
        self.latency_s = 0.3
        self.hits = 0
        self.requests: list[tuple[str, str]] = []
        self._count = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy
            upstream_address = upstream.removeprefix("http://")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_fault(self, method: str, path: str) -> str:
        with self._lock:
            self.requests.append((method, path))
            self._count += 1
            hit = bool(self.fault) and (self.fault == "outage" or self._count % self.every == 0)
            hit = hit and self.only(path)
            self.hits += hit
            return self.fault if hit else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ClassVar[FaultProxy]
    upstream_address: ClassVar[str]

    def log_message(self, *_: Any) -> None:
        pass

    def forward(self) -> None:
        fault = self.owner.next_fault(self.command, self.path)
        size = int(self.headers.get("Content-Length", 0))
        if fault == "outage":
            return self.reset()
        if fault == "reset-request":
            self.rfile.read(size // 2)
            return self.reset()
        body = self.rfile.read(size)
        if fault == "latency":
            until = time.monotonic() + self.owner.latency_s
            while self.owner.fault == "latency" and time.monotonic() < until:
                time.sleep(0.02)
            if self.owner.fault == "outage":
                return self.reset()  # a store that goes takes with it what was on its way
        if fault in ("500", "503"):
            return self.answer(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
        connection = http.client.HTTPConnection(self.upstream_address, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length", "0")
        finally:
            connection.close()
        if fault == "lost-answer":
            return self.reset()
        return self.answer(answer.status, headers, content, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def answer(self, status: int, headers: dict[str, str], content: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault in ("reset", "truncate"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "reset":
                self.reset()
        elif fault == "slow":
            for at in range(0, len(content), 64 * 1024):
                self.wfile.write(content[at : at + 64 * 1024])
                time.sleep(0.02)
        else:
            self.wfile.write(content)

    def reset(self) -> None:
        """Close with RST: what the peer of a dead host or an overloaded balancer sees."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.rfile = self.wfile = _Nothing()  # type: ignore[assignment]


class _Nothing:
    """What the handler flushes and closes after a reset."""

    closed = True

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def readline(self, _: int = 0) -> bytes:
        return b""


_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
