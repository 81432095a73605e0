"""What of the GPU side a checkpoint depends on: model and count, driver, CUDA's user-space version.

The driver's version counts in full: device state is restored by the same code that saved it, and nothing
documents which other versions read it.
"""

from __future__ import annotations

from collections.abc import Sequence

from relume.gpu.nvml import Gpu, Machine


def facts(machine: Machine, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """For the platform key of an instance that was given ``gpus``; () for none. Equal facts: restorable."""
    if not gpus:
        return ()
    models = sorted({gpu.model for gpu in gpus})
    return (
        *(f"{sum(gpu.model == model for gpu in gpus)} x {model}" for model in models),
        f"driver {machine.driver_version}",
        f"CUDA {cuda_text(machine.cuda_version)}",
    )


def cuda_text(version: int) -> str:
    """12080 as "12.8"."""
    return f"{version // 1000}.{version % 1000 // 10}"
