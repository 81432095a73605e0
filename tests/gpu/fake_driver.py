"""Builds the fake driver of fake_libcuda.c and lays out the machine it reports; shared by tests and gpu-check --fake.

Run as a program it builds into the folder given and prints the environment to use: ``fake_driver.py DIR``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_libcuda.c")
UUIDS = tuple(f"GPU-{n:08x}-1111-2222-3333-444444444444" for n in range(1, 9))


@dataclasses.dataclass(frozen=True)
class FakeMachine:
    """A folder with the library (``lib``) and the state of its GPUs (``state``)."""

    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / "lib"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "LD_LIBRARY_PATH": str(self.library), "FAKE_CUDA_DIR": str(self.state)}

    def describe(self, *, version: str = "580.65.06", cuda: int = 13000, gpus: int = 1, size: int = 1 << 30,
                 model: str = "NVIDIA L4", mig: bool = False) -> None:  # fmt: skip
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "driver").write_text(f"{version} {cuda}\n")
        lines = (f"{UUIDS[index]} {size} {int(mig)} 1 {model}\n" for index in range(gpus))
        (self.state / "gpus").write_text("".join(lines))

    def fault(
        self, call: str, code: int, *, pid: int = 0, times: int = 1, delay_ms: int = 0, also: str = "-"
    ) -> None:
        with (self.state / "faults").open("a") as faults:
            faults.write(f"{call} {pid} {code} {times} {delay_ms} {also}\n")

    def device_bytes(self) -> int:
        """What the GPUs hold now."""
        return sum(file.stat().st_size for file in self.state.glob("dev*/*"))


def compile_library(folder: Path) -> None:
    """gcc; the one library answers under both names."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
    subprocess.run(["gcc", *flags, "-o", folder / "libcuda.so.1", SOURCE, "-lpthread", "-ldl"], check=True)
    (folder / "libnvidia-ml.so.1").unlink(missing_ok=True)
    (folder / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")


if __name__ == "__main__":
    machine = FakeMachine(Path(sys.argv[1]))
    compile_library(machine.library)
    machine.describe(gpus=2, size=8 << 30)
    print(json.dumps({key: machine.env[key] for key in ("LD_LIBRARY_PATH", "FAKE_CUDA_DIR")}))
