"""Where a node keeps things.

``state`` (default /var/lib/relume, 0700) holds what must outlive a reboot; ``runtime``
(/run/relume/NODE_ID, 0711) what must not: mounts, sockets, FIFOs, runc's state. runc and CRIU reach the
latter as the mapped root, a nobody on the host, so no folder above it may be closed to others.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

RUN = Path("/run/relume")
CGROUP = "/relume"

KDAT_DIRECTORY = Path("/dev/shm/relume-criu")
"""The RUNDIR that script/bootstrap builds CRIU with: on a tmpfs, where CRIU agrees to keep criu.kdat."""


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """The directories of one node."""

    state: Path
    node_id: str

    @property
    def runtime(self) -> Path:
        return RUN / self.node_id

    @property
    def runc_root(self) -> Path:
        return self.runtime / "runc"

    @property
    def verified(self) -> Path:
        """What was verified of which image in this boot."""
        return self.runtime / "verified"

    @property
    def region(self) -> Path:
        """The cache of the region's checkpoints, this node's own key, what it has seen."""
        return self.state / "region"

    @property
    def socket(self) -> Path:
        return self.state / "node.sock"

    @property
    def cgroup(self) -> str:
        return f"{CGROUP}/{self.node_id}"

    def instance(self, instance_id: str) -> InstancePlaces:
        return InstancePlaces(
            runtime=self.runtime / instance_id,
            kept=self.state / "instances" / instance_id,
            cgroup=f"{self.cgroup}/{instance_id}",
        )

    def persistent(self, app: str) -> Path:
        """The folder behind /persistent-storage of an app."""
        return self.state / "persistent" / app

    def secrets(self, app: str) -> Path:
        return self.state / "secrets" / f"{app}.json"


@dataclasses.dataclass(frozen=True, slots=True)
class InstancePlaces:
    """The directories of one instance: ``runtime`` goes with it, ``kept`` holds its log until it is pruned."""

    runtime: Path
    kept: Path
    cgroup: str

    @property
    def rootfs(self) -> Path:
        return self.runtime / "rootfs"

    @property
    def bundle(self) -> Path:
        return self.runtime / "bundle"

    @property
    def images(self) -> Path:
        return self.runtime / "images"

    @property
    def criu_work(self) -> Path:
        """CRIU's work directory; here because the path of a unix socket has 107 bytes at most."""
        return self.runtime / "criu"

    @property
    def engine_bin(self) -> Path:
        """What runc and CRIU find before anything else (relume.engine.tmpfs)."""
        return self.runtime / "bin"

    @property
    def upper(self) -> Path:
        return self.kept / "layer" / "upper"

    @property
    def work(self) -> Path:
        return self.kept / "layer" / "work"

    @property
    def log(self) -> Path:
        return self.kept / "log"

    @property
    def exit_file(self) -> Path:
        return self.kept / "exit.json"
