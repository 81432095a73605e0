"""What `relume doctor` says of the GPU side: what is there, what is missing, and what to do about it.

Runs the driver's and NVML's calls through the helper; reads files otherwise. A machine without a GPU gets one finding
that says so, and nothing is wrong with it.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from relume.errors import RelumeError
from relume.gpu import cdi
from relume.gpu.client import DriverHelper
from relume.gpu.driver import MIN_DRIVER_REMAP, check_version
from relume.gpu.nvml import Machine
from relume.gpu.platform import cuda_text

Level = Literal["ok", "warning", "problem", "absent"]
_PLUGIN: Final = Path("/usr/lib/criu/cuda_plugin.so")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``absent``: not there, and nothing needs it unless an app asks for a GPU."""

    name: str
    level: Level
    message: str
    hint: str = ""


async def examine(helper: DriverHelper, folders: Sequence[Path] = cdi.FOLDERS) -> list[Finding]:
    """All findings, most basic first. Never raises for what is missing."""
    try:
        hello, machine = await helper.hello(), await helper.survey()
    except RelumeError as error:
        return [Finding("gpu helper", "problem", error.message, error.hint)]
    if not machine.gpus:
        hint = "apps with [cerebrium.hardware] compute other than CPU cannot run here"
        return [Finding("gpu", "absent", f"no NVIDIA GPU ({machine.reason})", hint)]
    findings = [Finding("gpu", "ok", f"{len(machine.gpus)}: " + ", ".join(gpu.model for gpu in machine.gpus))]
    findings += _driver(machine)
    if hello["ready"]:
        version = cuda_text(hello["cuda_version"])
        message = (
            f"libcuda (CUDA {version}) has the checkpoint functions; it took {hello['init_s']} s to start"
        )
        findings.append(Finding("gpu libcuda", "ok", message))
    else:
        findings.append(Finding("gpu libcuda", "problem", hello["error"]["message"], hello["error"]["hint"]))
    return [*findings, *_modes(machine), *_containers(machine, folders), *_surroundings()]


def _driver(machine: Machine) -> Iterator[Finding]:
    try:
        check_version(machine.driver_version)
    except RelumeError as error:
        yield Finding("gpu driver", "problem", error.message, error.hint)
        return
    yield Finding("gpu driver", "ok", f"NVIDIA driver {machine.driver_version}")
    if len(machine.gpus) > 1:
        try:
            check_version(machine.driver_version, remap=True)
        except RelumeError:
            message = "a checkpoint can only be restored onto the very GPU it was taken on"
            yield Finding(
                "gpu driver", "warning", message, f"driver {MIN_DRIVER_REMAP} maps to others of the model"
            )


def _modes(machine: Machine) -> Iterator[Finding]:
    for gpu in machine.gpus:
        if gpu.mig:
            message = f"GPU {gpu.index} is in MIG mode, which the driver cannot checkpoint"
            yield Finding("gpu mig", "warning", message, f"nvidia-smi -i {gpu.index} -mig 0")
    if any(holder.mps for holder in machine.holders):
        message = "processes run under the Multi-Process Service, which the driver cannot checkpoint"
        yield Finding("gpu mps", "warning", message, "echo quit | nvidia-cuda-mps-control")
    if not all(gpu.persistence for gpu in machine.gpus):
        message = "persistence mode is off: a GPU that nobody uses takes seconds to wake up"
        yield Finding("gpu persistence", "warning", message, "nvidia-smi -pm 1, or run nvidia-persistenced")


def _containers(machine: Machine, folders: Sequence[Path]) -> Iterator[Finding]:
    registry = cdi.load(folders)
    for problem in registry.problems:
        yield Finding("gpu cdi", "warning", problem, "remove the file, or make it anew")
    try:
        edits = cdi.edits_for(registry, machine.gpus)
    except RelumeError as error:
        yield Finding("gpu cdi", "problem", error.message, error.hint)
        return
    lacking = sorted({hook["path"] for _, hook in edits.hooks if not Path(hook["path"]).exists()})
    if lacking:
        message = f"CDI wants {', '.join(lacking)} run for each container, which is not there"
        yield Finding("gpu cdi", "problem", message, f"install nvidia-container-toolkit, then {cdi.GENERATE}")
    else:
        yield Finding("gpu cdi", "ok", f"CDI devices for {len(machine.gpus)} GPUs in {_sources(registry)}")


def _surroundings() -> Iterator[Finding]:
    if platform.machine() != "x86_64":
        message = f"NVIDIA documents checkpoints for x86-64 only (cuda-checkpoint README), this is {platform.machine()}"
        yield Finding("gpu arch", "warning", message)
    if _PLUGIN.exists() and shutil.which("cuda-checkpoint"):
        message = f"CRIU's own CUDA plugin is installed ({_PLUGIN}); relume does its work itself"
        yield Finding(
            "gpu criu plugin", "warning", message, "relume gives CRIU an empty libdir; leave that so"
        )


def _sources(registry: cdi.Registry) -> str:
    return ", ".join(sorted({str(device.source) for device in registry.devices.values()}))
