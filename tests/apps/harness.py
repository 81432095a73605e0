"""A node of its own for the suite, driven by the command line only, and what became of each app."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RELUME = ROOT / "script" / "relume"

#: Where results are collected, one JSON object by app; report.py makes the page from it.
RESULTS = Path(os.environ.get("RELUME_APPS_RESULTS", ROOT / "build" / "apps.json"))

#: The line that a restored instance's log begins with, as documented.
RESTORED = "CEREBRIUM_RESTORED: container restored from checkpoint"


class Failed(Exception):
    """A command of the CLI failed; the message has what it said."""


class Node:
    """A running node. Its state is a temporary folder, or ``RELUME_APPS_STATE`` to keep builds for the next run."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.log = state / "node.log"
        self._environment = {**os.environ, "RELUME_STATE": str(state)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [RELUME, "node", "run"],
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def relume(self, *arguments: str | Path, timeout: float = 120) -> Any:
        """Run a command; its JSON, None if it printed nothing. Raises Failed."""
        done = subprocess.run(
            [RELUME, *arguments, "-o", "json"],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode != 0:
            raise Failed(
                f"relume {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return json.loads(done.stdout) if done.stdout.strip() else None

    def instance_log(self, instance: str) -> str:
        done = subprocess.run(
            [RELUME, "logs", instance],
            env=self._environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        return done.stdout

    def states(self) -> dict[str, str]:
        return {row["instance_id"]: row["state"] for row in self.relume("ps")}

    def forget(self, app: str) -> None:
        """Stop and remove an app, as far as it came."""
        for command in (("stop", app), ("apps", "rm", app)):
            try:
                self.relume(*command)
            except Failed as error:
                if '"not_found"' not in str(error):
                    raise

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                self.relume("node", "status")
                return
            except Failed:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise Failed(f"the node does not come up:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def a_node() -> Iterator[Node]:
    """A node for the duration, and nothing of it afterwards (but the state, if it is to be kept)."""
    kept = os.environ.get("RELUME_APPS_STATE")
    state = Path(kept or tempfile.mkdtemp(prefix="relume-apps-", dir="/var/tmp"))
    state.mkdir(parents=True, exist_ok=True)
    node = Node(state)
    try:
        node.wait_until_up()
        yield node
        for app in {row["app"] for row in node.relume("ps")}:
            node.relume("stop", app)
    finally:
        node.stop()
        if not kept:
            shutil.rmtree(state)


def names() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/check.py"))


def load_check(name: str) -> ModuleType:
    """An app's ``check.py``: ``TITLE``, ``FAST``, ``check(ask)``, and ``UNSUPPORTED`` where that is the point."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    module_name = f"check_{name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(module_name, HERE / name / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(name: str, **facts: Any) -> None:
    """Put one app's result beside those that are there."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = facts
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
