"""How instances of a build are run: what the node reads out of the build's configuration."""

from __future__ import annotations

import dataclasses

from relume.build import Build
from relume.runc import Limits

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """``boot_timeout`` in seconds; ``readycheck`` is an HTTP path, or empty to probe the port."""

    limits: Limits
    readycheck: str
    boot_timeout: float
    trigger: str
    filesystem: str
    loopback: str
    fill: str
    held_limit: int
    prepared: int
    prepared_fill: str
    prepared_max_age: float
    compute: tuple[str, ...] = ("CPU",)
    gpus: int = 0
    """GPUs of one model that ``compute`` names; 0 for an app without."""

    @classmethod
    def of(cls, build: Build) -> Settings:
        hardware = build.config["hardware"]
        custom = build.config["runtime"].get("custom") or {}
        policy = build.config["relume"]["checkpoint"]
        return cls(
            limits=Limits(memory=round(hardware["memory"] * _GIB), cpus=hardware["cpu"]),
            readycheck=custom.get("readycheck_endpoint") or "",
            boot_timeout=float(build.config["deployment"]["deployment_initialization_timeout"]),
            trigger=policy["trigger"],
            filesystem=policy["filesystem"],
            loopback=policy["loopback"],
            fill=policy["fill"],
            held_limit=policy["max_held_file_bytes"],
            prepared=policy["prepared"],
            prepared_fill=policy["prepared_fill"],
            prepared_max_age=float(policy["prepared_max_age_s"]),
            compute=tuple(hardware["compute"]),
            gpus=0 if "CPU" in hardware["compute"] else hardware["gpu_count"],
        )
