"""Which of the machine's GPUs an instance gets: ``[cerebrium.hardware] compute`` matched to models by name.

The names of ``compute`` are Cerebrium's; the models' are NVML's ("NVIDIA A100-SXM4-80GB"). A model is the chip, so
that every product with it counts ("H100 PCIe", "H100 80GB HBM3"); the two A100 differ by their memory. A checkpoint
is bound to NVML's full name: the driver restores onto "the same chip type" only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

from relume.errors import GpuUnavailable
from relume.gpu.nvml import Gpu, Machine

_CHIPS: Final = {
    "TURING_T4": ("T4",),
    "AMPERE_A10": ("A10", "A10G"),
    "AMPERE_A100": ("A100",),
    "AMPERE_A100_80GB": ("A100",),
    "ADA_L4": ("L4",),
    "ADA_L40": ("L40", "L40S"),
    "HOPPER_H100": ("H100",),
    "HOPPER_H200": ("H200",),
}
_LARGE_A100: Final = 60 << 30
"""Between the A100 of 40 GB and the one of 80 GB."""


def matches(gpu: Gpu, compute: str) -> bool:
    """Whether a GPU is what ``compute`` names (``relume.config`` has checked that it is a name of the schema)."""
    chips = _CHIPS.get(compute, ())
    words = re.split(r"[^A-Z0-9]+", gpu.model.upper())
    if not any(chip in words for chip in chips):
        return False
    return "A100" not in chips or (gpu.memory_bytes > _LARGE_A100) == compute.endswith("80GB")


def choose(
    machine: Machine,
    compute: Sequence[str],
    count: int,
    taken: Collection[str] = (),
    *,
    model: str = "",
    prefer: Collection[str] = (),
) -> tuple[Gpu, ...]:
    """``count`` GPUs of one model that nobody has; the first entry of ``compute`` that fits wins.

    ``taken`` are UUIDs in use by other instances. ``model`` (NVML's name) narrows the choice to what a checkpoint can
    be restored on; ``prefer`` are the UUIDs it was taken on, where a copy needs no remapping. Then the GPU with the
    least memory in use comes first. Raises GpuUnavailable, saying what there is.
    """
    free = [gpu for gpu in machine.gpus if gpu.uuid not in taken and not gpu.mig]
    for wanted in compute:
        fitting = [gpu for gpu in free if matches(gpu, wanted) and model in ("", gpu.model)]
        for name in dict.fromkeys(gpu.model for gpu in fitting):
            same = [gpu for gpu in fitting if gpu.model == name]
            same.sort(key=lambda gpu: (gpu.uuid not in prefer, gpu.used_bytes, gpu.index))
            if len(same) >= count:
                return tuple(same[:count])
    have = ", ".join(f"{gpu.model}{' (in use)' if gpu.uuid in taken else ''}" for gpu in machine.gpus)
    raise GpuUnavailable(
        f"no {count} free GPU{'s' * (count != 1)} for compute = {', '.join(compute)}"
        f"{f' and the checkpoint of {model}' if model else ''}: this machine has {have or machine.reason or 'none'}",
        hint="change [cerebrium.hardware] compute or gpu_count, or stop an instance that holds one",
    )


def pair(saved: Sequence[str], given: Sequence[Gpu]) -> dict[str, str]:
    """The GPU map of a restore: the UUIDs of the checkpoint's instance onto those of the copy's, in their order.

    ``saved`` are all GPUs that the instance was given, used or not: the driver wants every one named. A GPU that is
    in both stays where it is. Raises GpuUnavailable when the counts differ.
    """
    if len(saved) != len(given):
        raise GpuUnavailable(
            f"the checkpoint was taken with {len(saved)} GPUs, the instance was given {len(given)}",
            hint="gpu_count must be what it was: deploy again to get a new build",
        )
    here = {gpu.uuid for gpu in given}
    rest = iter([gpu.uuid for gpu in given if gpu.uuid not in saved])
    return {old: old if old in here else next(rest) for old in saved}
