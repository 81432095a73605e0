"""``checkpoints inspect``: a checkpoint's own record, as people and programs see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relume.build import Build
from relume.checkpoint.shelf import Checkpoint
from relume.errors import ImageError
from relume.images import pages_sizes
from relume.pager import working_set


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that was known when it was made. Sizes in bytes, times in seconds or as the name says."""
    taken_on = checkpoint.platform
    return {
        "instance_id": checkpoint.instance_id,
        "frozen_ms": round(checkpoint.frozen_s * 1000),
        "timings": checkpoint.timings,
        "processes": checkpoint.processes,
        "mappings": checkpoint.memory,
        "lazy_bytes": checkpoint.lazy_bytes,
        "left_behind": checkpoint.left_behind,
        "warnings": checkpoint.warnings,
        "loopback": checkpoint.loopback,
        "filesystem": checkpoint.filesystem,
        "platform": {
            "key": taken_on.key,
            "arch": taken_on.arch,
            "kernel": taken_on.kernel,
            "criu": taken_on.criu,
            "runc": taken_on.runc,
            "cpu": list(taken_on.cpu),
            "gpu": list(taken_on.gpu),
        },
        "gpu": checkpoint.gpu,
    }


def learned_bytes(directory: Path) -> int | None:
    """Bytes of the working set that was learned on this node; None where none was. Reads nothing large."""
    try:
        learned, _ = working_set.load(directory / "working-set", pages_sizes(directory / "images"))
    except (ImageError, OSError):
        return None
    return learned.total if learned is not None else None


def why_not_on(
    build: Build | None, checkpoint: Checkpoint, layers: tuple[str, ...] | None = None
) -> list[str]:
    """Why the builds of this node keep it from being used; ``layers`` are the digests that it was taken on."""
    if build is None:
        return [f"its build {checkpoint.build_id} is not on this node: deploy {checkpoint.app} here"]
    here = tuple(layer.digest for layer in build.layers)
    if layers is None or layers == here:
        return []
    if layers[:1] != here[:1]:
        return [f"base: taken on {(layers or ('none',))[0][:12]}, here {(here or ('none',))[0][:12]}"]
    return ["it was taken on other layers than this node has of its build"]
