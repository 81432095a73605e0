"""A node of the benchmark's own, in a temporary state, apart from any other on the machine.

Guarantees: at the end nothing of it is left but the build cache (``CACHE``), which spares the next run the making
of a base and the installing of packages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from relume.cli.benchmark.network import Network
from relume.cli.client import NodeClient
from relume.errors import HostError, NodeUnreachable, RelumeError

CACHE = Path("/var/cache/relume/bench")

_RUN = Path("/run/relume")
_PATIENCE = 60.0

T = TypeVar("T")


class OwnNode:
    """A running node and its API. ``state`` is removed with it; ``config`` is its node.toml, if any.

    With ``network`` it lives in that one, where also its instances' addresses are.
    """

    def __init__(
        self,
        state: Path,
        config: Path | None = None,
        environment: Mapping[str, str] | None = None,
        network: Network | None = None,
    ) -> None:
        self.state = state
        self._network = network
        self._arguments = ["--config", str(config)] if config else []
        self._environment = {**os.environ, **(environment or {}), "RELUME_STATE": str(state)}
        self.client = NodeClient(state)
        self._log = state / "node.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.node_id = ""

    def open(self) -> None:
        """Start it; returns when it answers. Raises HostError."""
        network = self._network
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(network.command() if network else ()),
                    *(sys.executable, "-m", "relume.cli.main", "node", "run", *self._arguments),
                ],
                pass_fds=(network.descriptor,) if network else (),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends the node in order
            )
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.node_id = str(self.client.get("/v1/status")["node_id"])
                return
            except NodeUnreachable:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise HostError(
                        f"the benchmark's node did not start: {self.last_words()}",
                        hint="relume doctor tests the machine",
                    ) from None
                time.sleep(0.05)

    def ask(self, question: Callable[[str], T], url: str) -> T:
        """``question`` of an instance's ``url``, asked in the node's network."""
        return self._network.run(lambda: question(url)) if self._network else question(url)

    def last_words(self, lines: int = 1) -> str:
        """The end of the node's log."""
        words = self._log.read_text(errors="replace").strip().splitlines()
        return "\n".join(words[-lines:]) or "it said nothing"

    # --- verbs ------------------------------------------------------------------------------------

    def deploy(self, directory: Path, name: str, config_file: Path | None = None) -> str:
        """Build an app under ``name``; returns the build_id."""
        body = {"directory": str(directory), "name": name}
        body |= {"config_file": str(config_file)} if config_file else {}
        result = self.client.stream("/v1/deploy", body, lambda text: None)
        return str(result["build_id"])

    def start(self, app: str, **body: Any) -> dict[str, Any]:
        """Start an instance; what the API answers."""
        answer: dict[str, Any] = self.client.stream(f"/v1/apps/{app}/start", body, lambda text: None)
        return answer

    def stop(self, target: str) -> None:
        """Stop an instance or an app's instances; returns when they are gone."""
        self.client.post("/v1/stop", {"target": target})

    def instances(self) -> list[dict[str, Any]]:
        """What `relume ps` shows."""
        rows: list[dict[str, Any]] = self.client.get("/v1/instances")
        return rows

    def await_prepared(self, app: str) -> None:
        """Wait until an instance of ``app`` is restored and stopped. Raises HostError."""
        deadline = time.monotonic() + _PATIENCE
        while not any(row["app"] == app and row["state"] == "prepared" for row in self.instances()):
            if time.monotonic() > deadline:
                raise HostError(
                    f"no instance of {app} was prepared in {_PATIENCE:.0f} s", hint=self.last_words()
                )
            time.sleep(0.05)

    def log_of(self, instance_id: str) -> str:
        return b"".join(self.client.raw(f"/v1/logs/{instance_id}")).decode(errors="replace")

    def checkpoint_of(self, app: str) -> dict[str, Any] | None:
        """The facts of the app's ready checkpoint."""
        for row in self.client.get("/v1/checkpoints"):
            if row["app"] == app and row["state"] == "ready":
                facts: dict[str, Any] = self.client.get(f"/v1/checkpoints/{row['checkpoint_id']}")
                return facts
        return None

    def images(self, checkpoint_id: str) -> Path:
        """The folder of a checkpoint's CRIU images."""
        return self.state / "checkpoints" / checkpoint_id / "images"

    def memory_group(self, instance_id: str) -> str:
        """The instance's cgroup, as relume.linux.cgroup names it."""
        return f"/relume/{self.node_id}/{instance_id}"

    def settle(self) -> None:
        """Wait until the node has a keeper ready again, as it has before any start on a machine at rest."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            taken = {row["instance_id"] for row in self.instances()}
            for spare in (_RUN / self.node_id).glob("i-*/keeper.sock"):
                if spare.parent.name not in taken:
                    time.sleep(0.4)  # its pager comes up behind it
                    return
            time.sleep(0.05)
        raise HostError("the benchmark's node makes no keepers", hint=f"its last words: {self.last_words()}")

    def clear(self) -> None:
        """End every instance and remove every checkpoint; the builds stay, for the next run."""
        for app in self.client.get("/v1/apps"):
            self.stop(app["app"])
        for checkpoint in self.client.get("/v1/checkpoints"):
            self.client.delete(f"/v1/checkpoints/{checkpoint['checkpoint_id']}")

    def close(self) -> None:
        """End every instance, then the node."""
        assert self._process is not None
        with contextlib.suppress(RelumeError):
            for row in self.client.get("/v1/apps"):
                self.stop(row["app"])
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def own_node(
    node_toml: str = "", environment: Mapping[str, str] | None = None, network: Network | None = None
) -> Iterator[OwnNode]:
    """A node while the block runs, with these settings. Raises HostError where it cannot be started."""
    if os.geteuid() != 0:
        raise HostError("bench runs a node of its own, and a node needs root", hint="run it with sudo")
    builds = CACHE / "builds"
    builds.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Beside the cache: layers and images on one file system, and that one a disk.
    state = Path(tempfile.mkdtemp(prefix="state-", dir=CACHE))
    (state / "builds").symlink_to(builds)
    config = state / "node.toml"
    config.write_text(node_toml)
    node = OwnNode(state, config, environment, network)
    try:
        node.open()
        try:
            yield node
        finally:
            node.close()
    finally:
        shutil.rmtree(state, ignore_errors=True)
