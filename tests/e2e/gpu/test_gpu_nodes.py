"""A copy on another GPU than the original's, as runc and CRIU see it: other device nodes, in a user namespace."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relume.errors import GpuError
from relume.gpu import cdi, nodes
from relume.gpu.nvml import Gpu
from relume.linux import mounts
from relume.runc.command import Runc, find_criu, find_runc

BASE = 100000
NAME = f"relume-test-gpu-{os.getpid()}-"
GPUS = [
    Gpu(index, f"GPU-{index}", "NVIDIA L4", 1 << 30, 0, mig=False, persistence=True) for index in range(2)
]
# Writes a line for each second that its GPU's node could be written to: the driver too finds a GPU by name.
PROGRAM = (
    f"while :; do for n in 0 1; do [ -c /dev/{NAME}$n ] && echo x >/dev/{NAME}$n && echo $n; done; "
    "sleep 0.2; done 2>/dev/null"
)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[cdi.Registry]:
    """Two "GPUs": character devices that swallow what is written, by the numbers of /dev/null and /dev/zero."""
    paths = [Path(f"/dev/{NAME}{index}") for index in range(2)]
    devices = []
    for index, (path, minor) in enumerate(zip(paths, (3, 5), strict=True)):
        path.unlink(missing_ok=True)
        os.mknod(path, 0o20666, os.makedev(1, minor))
        path.chmod(0o666)
        devices.append({"name": str(index), "containerEdits": {"deviceNodes": [{"path": str(path)}]}})
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/nvidia.json").write_text(json.dumps({"kind": "nvidia.com/gpu", "devices": devices}))
    yield cdi.load([tmp_path / "cdi"])
    for path in paths:
        path.unlink()


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(f"/run/{NAME}")
    path.mkdir()
    mounts.mount("tmpfs", path, "tmpfs")
    path.chmod(0o711)
    yield path
    mounts.unmount_all(path)
    path.rmdir()


def config(bundle: Path, name: str, options: Path) -> dict[str, Any]:
    mapping = [{"containerID": 0, "hostID": BASE, "size": 65536}]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(bundle / "root")},
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", PROGRAM],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "user")],
            "cgroupsPath": f"/{name}",
            "uidMappings": mapping,
            "gidMappings": mapping,
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
        "annotations": {"org.criu.config": str(options)},
    }


class Instance:
    def __init__(self, folder: Path, name: str, edits: cdi.OciEdits) -> None:
        self.bundle, self.name = folder / name, f"{NAME}{name}"
        self.runc = Runc(find_runc(), folder / "runc", find_criu())
        (folder / "criu.conf").write_text(
            f"file-locks\nnetwork-lock skip\ntcp-close\ncgroup-root /{self.name}\n"
        )
        for part in ("upper", "work", "root"):
            (self.bundle / part).mkdir(parents=True)
        os.chown(self.bundle / "upper", BASE, BASE)
        mounts.overlay([Path("/")], self.bundle / "upper", self.bundle / "work", self.bundle / "root")
        text = json.dumps(cdi.apply(config(self.bundle, self.name, folder / "criu.conf"), edits))
        (self.bundle / "config.json").write_text(text)

    def run(self, verb: str, *arguments: str) -> None:
        argv = self.runc.argv(verb, *arguments, self.name, log=self.bundle / "log")
        done = subprocess.run(argv, env=self.runc.environment(), check=False, capture_output=True)
        assert done.returncode == 0, (self.bundle / "log").read_text()

    def start(self, verb: str, *arguments: str) -> None:
        self.output, theirs = os.pipe()
        argv = self.runc.argv(
            verb,
            "--detach",
            f"--bundle={self.bundle}",
            f"--pid-file={self.bundle / 'pid'}",
            *arguments,
            self.name,
        )
        done = subprocess.run(
            argv,
            env=self.runc.environment(),
            check=False,
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        assert done.returncode == 0, self.words()
        self.pid = int((self.bundle / "pid").read_text())

    def words(self, until: str | None = None) -> list[str]:
        """What it writes in one second; with ``until``, from now on until it writes that and in one second more."""
        os.set_blocking(self.output, False)
        self._drain()
        text = ""
        deadline = time.monotonic() + 30
        while until is not None and until not in text.split() and time.monotonic() < deadline:
            time.sleep(0.05)
            text += self._drain()
        time.sleep(1)
        return (text + self._drain()).split()

    def _drain(self) -> str:
        text = b""
        try:
            while part := os.read(self.output, 65536):
                text += part
        except BlockingIOError:
            pass
        return text.decode()

    def end(self) -> None:
        subprocess.run(self.runc.argv("delete", "--force", self.name), check=False, capture_output=True)
        if hasattr(self, "output"):
            os.close(self.output)


async def test_the_copy_has_the_node_of_its_gpu_and_not_the_originals(
    registry: cdi.Registry, folder: Path
) -> None:
    images = folder / "images"
    first = cdi.edits_for(registry, GPUS[:1])
    original = Instance(folder, "original", first)
    try:
        original.start("run")
        assert set(original.words("0")) == {"0"}
        original.run("checkpoint", "--leave-running", f"--image-path={images}", f"--work-path={images}")
    finally:
        original.end()
    for path in (images, *images.rglob("*")):
        path.chmod(0o755)  # CRIU reads some images as the mapped root
    edits, new, old = cdi.for_copy(cdi.edits_for(registry, GPUS[1:]), first.nodes)
    copy = Instance(folder, "copy", edits)
    try:
        copy.start("restore", f"--image-path={images}", f"--work-path={images}")
        assert "1" not in copy.words()
        inside = Path(f"/proc/{copy.pid}/root/dev")
        assert (inside / f"{NAME}0").stat().st_rdev == Path("/dev/null").stat().st_rdev
        await nodes.change(copy.pid, new, old)
        assert "1" in copy.words("1")
        assert not (inside / f"{NAME}0").exists()
        assert (inside / f"{NAME}1").stat().st_rdev == os.makedev(1, 5)
    finally:
        copy.end()


async def test_a_node_that_is_not_there_is_an_error() -> None:
    with pytest.raises(GpuError, match=r"No such file.*'/dev/relume-none'"):
        await nodes.change(os.getpid(), ["/dev/relume-none"], [])
