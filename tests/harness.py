"""A node and apps for end-to-end tests, driven through the command line as a user would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from relume.linux import mounts

MAIN = [sys.executable, "-m", "relume.cli.main"]

# The trigger of the documented interface, as apps paste it.
SNIPPET = """
import http.client, urllib.request
try:
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    with urllib.request.urlopen(request, timeout=600) as response:
        print(response.read().decode(), flush=True)
except http.client.RemoteDisconnected:
    print("RESTORED", flush=True)
"""

SERVER = """
import http.server, json, os, socket, threading, time
STATE = {"hits": 0, "boot": time.time()}
ACTIONS = {}
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        name, _, argument = self.path.strip("/").partition("/")
        try:
            body = json.dumps(ACTIONS.get(name, lambda _: STATE)(argument)).encode()
            status = 200
        except Exception as error:
            body, status = repr(error).encode(), 500
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
def count(_):
    STATE["hits"] += 1
    return STATE
ACTIONS["count"] = count
ACTIONS["facts"] = lambda _: {"host": socket.gethostname(), "env": dict(os.environ), "now": time.time(),
    "resolv": open("/etc/resolv.conf").read(), "uid": os.getuid(), "pid": os.getpid()}
ACTIONS["get"] = lambda url: __import__("urllib.request").request.urlopen(url, timeout=30).read().decode()
ACTIONS["env"] = lambda _: json.loads(ACTIONS["get"]("http://169.254.169.253:8234/env"))
ACTIONS["status"] = lambda _: json.loads(ACTIONS["get"]("http://169.254.169.253:8234/status"))
ACTIONS["exists"] = lambda path: os.path.exists("/" + path)
def serve(port=8000):
    http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
"""


class Failed(Exception):
    """The command line answered with an error; ``error`` is its JSON."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(json.dumps(error)[:4000])
        self.error = error


class Relume:
    """A node process on ``state``, and its command line."""

    def __init__(self, state: Path, *, config: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.state = state
        self.config = config
        self.env = {**os.environ, "RELUME_STATE": str(state), **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.log = state.parent / f"{state.name}.node.log"
        self.program = MAIN
        """What runs the node; a test may put another one in its place."""

    def start_node(self) -> None:
        arguments = ["--config", str(self.config)] if self.config else []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.program, "node", "run", *arguments],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while self.run("node", "status", check=False).returncode != 0:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kill_node(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(120)

    def run(
        self, *arguments: str, check: bool = True, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*MAIN, *arguments], env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def json(self, *arguments: str, timeout: float = 300) -> Any:
        done = self.run(*arguments, "-o", "json", check=False, timeout=timeout)
        answer = json.loads(done.stdout) if done.stdout.strip() else {"error": {"stderr": done.stderr}}
        if isinstance(answer, dict) and "error" in answer:
            raise Failed(answer["error"])
        return answer

    def deploy(self, directory: Path, *arguments: str) -> Any:
        return self.json("deploy", str(directory), "-y", *arguments)

    def start(self, app: str, *arguments: str) -> Any:
        return self.json("start", app, *arguments)

    def logs(self, target: str) -> str:
        return self.run("logs", target).stdout

    def ps(self, app: str) -> list[dict[str, Any]]:
        return [row for row in self.json("ps") if row["app"] == app]

    def checkpoints(self, app: str) -> list[dict[str, Any]]:
        return [row for row in self.json("checkpoints", "ls") if row["app"] == app]

    def stop(self, target: str) -> None:
        self.run("stop", target, check=False)

    def remove(self, app: str) -> None:
        self.run("apps", "rm", app, check=False)

    def answer_of_post(self, instance: str) -> Any:
        """The JSON that the snippet printed."""
        lines = [line for line in self.logs(instance).splitlines() if line.startswith('{"status"')]
        assert lines, self.logs(instance)
        return json.loads(lines[0])

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            for row in self.json("apps", "ls"):
                self.stop(row["app"])
            self.kill_node(signal.SIGTERM)


def get(started: dict[str, Any], path: str = "/", timeout: float = 60) -> Any:
    """GET a path of a started instance, as JSON."""
    with urllib.request.urlopen(started["url"] + path, timeout=timeout) as response:
        return json.loads(response.read())


class App:
    """An app directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        directory.mkdir()

    def write(
        self, main: str, *, checkpointing: bool = True, extra: str = "", ready: str = "/", server: bool = True
    ) -> App:
        (self.directory / "cerebrium.toml").write_text(
            textwrap.dedent(
                f"""\
                [cerebrium.deployment]
                name = "{self.name}"
                [cerebrium.runtime.custom]
                entrypoint = ["python3", "main.py"]
                port = 8000
                readycheck_endpoint = "{ready}"
                [cerebrium.experimental]
                checkpointing = {str(checkpointing).lower()}
                """
            )
            + extra
        )
        (self.directory / "main.py").write_text((SERVER if server else "") + textwrap.dedent(main))
        return self


def share_builds(relume: Relume, state: Path) -> None:
    subprocess.run(["cp", "-al", str(relume.state / "builds"), str(state / "builds")], check=True)


def until(condition: Any, patience: float = 120, what: str = "") -> Any:
    """Wait until ``condition()`` is true; returns what it gave."""
    deadline = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < deadline, what or "it did not come to be in time"
        time.sleep(0.05)
    return value


def in_its_dump(
    relume: Relume,
    app: App,
    pool: Executor,
    started: dict[str, Any],
    path: str,
    reached: Callable[[], object],
) -> Future[Any]:
    """Ask for a checkpoint at ``path``, and return when ``reached`` is true in the middle of it.

    A machine that is busy may let nobody look before all is over: then it is asked for anew.
    """
    for _ in range(10):
        asked = pool.submit(get, started, path, 120)
        deadline = time.monotonic() + 120
        while not asked.done() and time.monotonic() < deadline:
            if reached():
                return asked
            time.sleep(0.005)
        asked.result(0)
        for row in relume.checkpoints(app.name):
            relume.run("checkpoints", "rm", row["checkpoint_id"])
    raise AssertionError(f"not once in the middle of {path}")


def shrink_to_fit(tmpfs: Path) -> None:
    """Leave a tmpfs 2 MiB more than is in it. The kernel refuses a size that is smaller than the content."""
    while True:
        usage = shutil.disk_usage(tmpfs)
        try:
            mounts.mount("tmpfs", tmpfs, "tmpfs", mounts.MS_REMOUNT, f"size={usage.used + (2 << 20)}")
            return
        except OSError:
            continue
