"""Builds the fake driver (fake_cuda.h says what it is) and lays out the machine it reports.

Run as a program, ``fake_driver.py DIR``, it builds into DIR (lib, state, cdi) and prints the environment to use.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

SOURCES = sorted(Path(__file__).parent.glob("fake_*.c"))
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

    def describe_cdi(self) -> Path:
        """A CDI file for these GPUs, in the folder returned: a container gets the library and the state."""
        folder = self.folder / "cdi"
        folder.mkdir(exist_ok=True)
        mounts = [
            {"hostPath": str(path.resolve()), "containerPath": str(path), "options": ["rbind", mode]}
            for path, mode in ((self.library, "ro"), (self.state, "rw"))
        ]
        env = [f"{key}={self.env[key]}" for key in ("LD_LIBRARY_PATH", "FAKE_CUDA_DIR")]
        node = {"path": "/dev/nvidia0", "type": "c", "major": 1, "minor": 3}
        devices = [{"name": uuid, "containerEdits": {"deviceNodes": [node]}} for uuid in UUIDS]
        shared = {"env": env, "mounts": mounts}
        spec = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": shared}
        (folder / "nvidia.json").write_text(json.dumps(spec))
        return folder

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
    subprocess.run(["gcc", *flags, "-o", folder / "libcuda.so.1", *SOURCES, "-lpthread", "-ldl"], check=True)
    (folder / "libnvidia-ml.so.1").unlink(missing_ok=True)
    (folder / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")


if __name__ == "__main__":
    machine = FakeMachine(Path(sys.argv[1]).resolve())
    compile_library(machine.library)
    machine.describe(gpus=2, size=4 << 30)
    machine.describe_cdi()
    for name in ("LD_LIBRARY_PATH", "FAKE_CUDA_DIR"):
        print(f"{name}={machine.env[name]}")
