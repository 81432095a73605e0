"""The OCI runtime config (runtime-spec 1.0) of every container that relume runs.

Guarantees: root inside is nobody on the host (a user namespace, unless ``id_base`` is None, as in builds);
Docker's default capabilities and seccomp rules; masked and read-only /proc and /sys paths; no new
privileges; no rlimit above our own (without CAP_SYS_RESOURCE runc could not set it).
"""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relume.runc import seccomp

ID_COUNT = 65536

DEFAULT_CAPABILITIES = frozenset(
    f"CAP_{name}"
    for name in """AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP
    SETGID SETPCAP SETUID SYS_CHROOT""".split()
)

_MASKED = (
    *(f"/proc/{name}" for name in ("acpi", "asound", "interrupts", "kcore", "keys", "latency_stats")),
    *(f"/proc/{name}" for name in ("sched_debug", "scsi", "timer_list", "timer_stats")),
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
_READONLY = tuple(f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger"))

_OOM_SCORE = Path("/proc/self/oom_score_adj")
"""A node may ask to be spared (packaging/relume.service), its apps may not. What is above 0 they keep: lowering
it takes CAP_SYS_RESOURCE."""

_MPTCP = Path("/proc/sys/net/mptcp/enabled")

_QUIET = ("nosuid", "noexec", "nodev")

_MOST_SHARES = 262_144
"""The kernel's limit of cpu.shares, which is cpu.weight 10000 of version 2; more processors than 256 have no more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """A mount inside, in the words of the runtime-spec."""

    destination: str
    source: str
    type: str = "bind"
    options: tuple[str, ...] = ("rbind", "rprivate")

    def as_dict(self) -> dict[str, Any]:
        return {
            "destination": self.destination,
            "type": self.type,
            "source": self.source,
            "options": list(self.options),
        }


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use: ``memory`` in bytes, ``cpus`` in cores, ``pids`` in processes and threads."""

    memory: int | None = None
    cpus: float | None = None
    pids: int | None = 32768


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """One container. ``id_base`` is the host id of root inside; None runs in the host's user namespace.

    ``create_runtime`` is the argv of a hook that runs at boot and again at restore, after the namespaces
    exist and before any process or socket of the container does; it gets the OCI state on its stdin.
    """

    rootfs: Path
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    hostname: str
    cgroup: str
    id_base: int | None
    uid: int = 0
    gid: int = 0
    mounts: Sequence[Mount] = ()
    limits: Limits = Limits()
    capabilities: frozenset[str] = DEFAULT_CAPABILITIES
    host_network: bool = False
    shm_bytes: int = 1 << 30
    create_runtime: Sequence[str] = ()
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        linux: dict[str, Any] = {
            "namespaces": [{"type": kind} for kind in self._namespaces()],
            "cgroupsPath": self.cgroup,
            "resources": self._resources(),
            "seccomp": seccomp.profile(self.capabilities),
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READONLY),
        }
        if not self.host_network and _MPTCP.exists():
            # CRIU cannot save a multipath TCP socket, and some languages listen with one unless it is refused.
            linux["sysctl"] = {"net.mptcp.enabled": "0"}
        if self.id_base is not None:
            mapping = [{"containerID": 0, "hostID": self.id_base, "size": ID_COUNT}]
            linux |= {"uidMappings": mapping, "gidMappings": mapping}
        config: dict[str, Any] = {
            "ociVersion": "1.0.2",
            "root": {"path": str(self.rootfs), "readonly": False},
            "hostname": self.hostname,
            "process": self._process(),
            "mounts": [mount.as_dict() for mount in (*self._system_mounts(), *self.mounts)],
            "linux": linux,
            "annotations": dict(self.annotations),
        }
        if self.create_runtime:
            hook = {"path": self.create_runtime[0], "args": list(self.create_runtime), "timeout": 30}
            config["hooks"] = {"createRuntime": [hook]}
        return config

    def _namespaces(self) -> list[str]:
        kinds = ["pid", "ipc", "uts", "mount"]
        if not self.host_network:
            kinds.append("network")
        if self.id_base is not None:
            kinds += ["user", "cgroup"]
        return kinds

    def _process(self) -> dict[str, Any]:
        capabilities = sorted(self.capabilities)
        nofile = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return {
            "terminal": False,
            "user": {"uid": self.uid, "gid": self.gid},
            "args": list(self.argv),
            "env": [f"{key}={value}" for key, value in self.env.items()],
            "cwd": self.cwd,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": True,
            "oomScoreAdj": max(0, int(_OOM_SCORE.read_text())),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": nofile, "soft": min(nofile, 65536)}],
        }

    def _resources(self) -> dict[str, Any]:
        limits = self.limits
        # The default devices (null, zero, full, random, urandom, tty, ptmx, pts) are runc's own doing.
        resources: dict[str, Any] = {"devices": [{"allow": False, "access": "rwm"}]}
        if limits.memory is not None:
            resources["memory"] = {"limit": limits.memory}
        if limits.cpus is not None:
            period = 100_000
            resources["cpu"] = {
                "quota": max(1000, round(limits.cpus * period)),
                "period": period,
                "shares": min(_MOST_SHARES, max(2, round(limits.cpus * 1024))),
            }
        if limits.pids is not None:
            resources["pids"] = {"limit": limits.pids}
        return resources

    def _system_mounts(self) -> list[Mount]:
        sys = (
            Mount("/sys", "/sys", "bind", ("rbind", *_QUIET, "ro"))
            if self.host_network and self.id_base is not None
            else Mount("/sys", "sysfs", "sysfs", (*_QUIET, "ro"))
        )
        return [
            Mount("/proc", "proc", "proc", ()),
            Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
            Mount(
                "/dev/pts",
                "devpts",
                "devpts",
                ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
            ),
            Mount("/dev/shm", "shm", "tmpfs", (*_QUIET, "mode=1777", f"size={self.shm_bytes}")),
            Mount("/dev/mqueue", "mqueue", "mqueue", _QUIET),
            sys,
            # A build has no use for it, and mounting it trips over hierarchies that a CRIU elsewhere has just mounted.
            *(
                ()
                if self.host_network
                else (Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*_QUIET, "relatime", "ro")),)
            ),
        ]
