"""``script/gpu-check``'s last step: the GPU path through runc and CRIU, from a running container into a copy of it.

As small as it can be, to show where a fault lies: the machine's own root filesystem under an overlay, no network, no
user namespace, one process, CRIU's eager restore. The original is checkpointed, resumed and asked; then it is ended,
and a copy restored from the images is given its GPU and asked the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import relume
from relume.errors import EngineError, GpuUnavailable, HostError, RelumeError
from relume.gpu import cdi
from relume.gpu.client import DriverHelper
from relume.gpu.nvml import Gpu, Machine
from relume.gpu.story import GpuCheckpointer
from relume.runc.command import Runc, find_criu, find_runc

_MIN_CRIU: Final = (4, 1)
_CRIU_OPTIONS: Final = "ext-unix-sk\nlink-remap\nfile-locks\nnetwork-lock skip\ntcp-close\n"
_ANSWER_S: Final = 600.0


@dataclass(slots=True)
class Container:
    """One container around the workload; ``folder`` holds its bundle and the files it is asked through."""

    runc: Runc
    name: str
    folder: Path
    shared: Path
    pid: int = 0
    stdio: list[int] = field(default_factory=list)

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Raises EngineError when it refuses, dies, or takes ten minutes."""
        answer = self.shared / "answer.json"
        answer.unlink(missing_ok=True)
        draft = self.shared / "request.draft"
        draft.write_text(json.dumps({"op": op, **arguments}))
        draft.rename(self.shared / "request.json")
        deadline = time.monotonic() + _ANSWER_S
        while not answer.exists():
            if time.monotonic() > deadline or not Path(f"/proc/{self.pid}").exists():
                raise EngineError(f"the process in {self.name} did not answer {op}", hint=self.last_words())
            await asyncio.sleep(0.02)
        result: dict[str, Any] = json.loads(answer.read_text())
        if not result.pop("ok"):
            raise EngineError(f"{op} in {self.name}: {result['error']}")
        return result

    def last_words(self) -> str:
        """What it wrote to its standard output and error so far, the end of it."""
        os.set_blocking(self.stdio[0], False)
        with contextlib.suppress(BlockingIOError):
            return os.read(self.stdio[0], 65536).decode(errors="replace")[-2000:]
        return ""


@dataclass(frozen=True, slots=True)
class Requirements:
    """What the step runs with."""

    gpu: Gpu
    runc: Runc
    edits: cdi.OciEdits


async def container_step(driver: DriverHelper, requirements: Requirements, size: int) -> dict[str, Any]:
    """The step's report. Raises RelumeError when something fails; nothing is left behind either way."""
    gpu, edits = requirements.gpu, requirements.edits
    checkpointer = GpuCheckpointer(driver)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relume-gpu-", dir="/run")))
        runc = replace(requirements.runc, root=work / "runc")
        images, options = work / "images", work / "criu.conf"
        (work / "plugins").mkdir()
        # An empty plugin folder: CRIU's own CUDA plugin would do at its own moments what we do at ours.
        options.write_text(f"{_CRIU_OPTIONS}libdir {work / 'plugins'}\n")
        original = stack.enter_context(_bundle(runc, work, "original", edits, options))
        _start(original, "run")
        await original.ask("fill", size=size, blocks=4, seed=size)
        before = await original.ask("hash")
        started = time.monotonic()
        suspended = await checkpointer.suspend([original.pid])
        try:
            dump_s = _runc(
                original, "checkpoint", "--leave-running", f"--image-path={images}", f"--work-path={work}"
            )
        finally:
            resumed = await checkpointer.resume(suspended)
        stopped_s = time.monotonic() - started
        went_on = await original.ask("hash") == before
        _end(original)
        copy = stack.enter_context(_bundle(runc, work, "copy", edits, options))
        restore_s = _start(copy, "restore", f"--image-path={images}", f"--work-path={work}")
        returned = await checkpointer.restore([copy.pid], {gpu.uuid: gpu.uuid}, expected=1)
        same = await copy.ask("hash") == before
        return {
            "ok": went_on and same,
            "original_goes_on": went_on,
            "content_equal_in_copy": same,
            "bytes": before["bytes"],
            "image_bytes": sum(file.stat().st_size for file in images.iterdir()),
            "suspend_s": round(suspended.seconds, 4),
            "dump_s": round(dump_s, 4),
            "resume_s": round(resumed.seconds, 4),
            "app_stopped_s": round(stopped_s, 4),
            "restore_s": round(restore_s, 4),
            "gpu_restore_s": round(returned.seconds, 4),
            "runc": _version(runc.binary),
            "criu": _version(runc.criu),
        }


def container_requirements(machine: Machine, registry: cdi.Registry) -> tuple[list[str], Requirements | None]:
    """What is missing here, in words; and what there is, if nothing is."""
    missing: list[str] = []
    if os.geteuid() != 0:
        missing.append("root")
    elif not _can_mount():
        missing.append("CAP_SYS_ADMIN (mounting an overlay)")
    runc: Runc | None = None
    try:
        runc = Runc(find_runc(), Path("/run/relume-gpu"), find_criu())
        version = tuple(int(part) for part in re.findall(r"\d+", _version(runc.criu))[:2])
        if version < _MIN_CRIU:
            missing.append(f"CRIU 4.1 or newer (this is {_version(runc.criu) or 'none that runs'})")
    except HostError as error:
        missing.append(f"{error.message}: {error.hint}")
    edits: cdi.OciEdits | None = None
    try:
        if not registry.devices:
            raise GpuUnavailable(
                "no CDI file names a GPU", hint="nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
            )
        edits = cdi.edits_for(registry, machine.gpus[:1])
    except RelumeError as error:
        missing.append(f"{error.message}: {error.hint}")
    if missing or runc is None or edits is None or not machine.gpus:
        return missing, None
    return [], Requirements(machine.gpus[0], runc, edits)


def _can_mount() -> bool:
    """CAP_SYS_ADMIN in our effective set (bit 21, capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    return bool(int(effective, 16) >> 21 & 1)


@contextlib.contextmanager
def _bundle(runc: Runc, work: Path, name: str, edits: cdi.OciEdits, options: Path) -> Iterator[Container]:
    """A bundle with a fresh writable layer over the machine's root; nothing of it is left afterwards."""
    folder, shared = work / name, work / f"{name}-shared"
    folder.mkdir()
    shared.mkdir()
    layers = f"lowerdir=/,upperdir={folder / 'upper'},workdir={folder / 'work'}"
    _run(["mount", "-t", "tmpfs", "tmpfs", str(folder)])
    container = Container(runc, f"relume-gpu-{os.getpid()}-{name}", folder, shared)
    try:
        for path in (folder / "upper", folder / "work", folder / "root"):
            path.mkdir()
        _run(["mount", "-t", "overlay", "-o", layers, "overlay", str(folder / "root")])
        config = cdi.apply(_config(folder, shared, options), edits)
        (folder / "config.json").write_text(json.dumps(config))
        yield container
    finally:
        _end(container)
        subprocess.run(["umount", "-l", str(folder / "root")], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def _config(folder: Path, shared: Path, options: Path) -> dict[str, Any]:
    quiet = ["nosuid", "noexec", "nodev"]
    # Parts of Python or of ours may lie on mounts of their own, which an overlay of / does not show.
    needed = dict.fromkeys(
        [sys.prefix, sys.base_prefix, str(Path(relume.__file__).parents[1]), *filter(None, sys.path)]
    )
    binds = [
        {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]}
        for path in needed
        if path != "/usr" and Path(path).is_dir()
    ]
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(folder / "root"), "readonly": False},
        "hostname": "gpu-check",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": [sys.executable, "-m", "relume.gpu.workload", "/shared"],
            "env": [f"{key}={value}" for key, value in environment.items()],
            "cwd": "/",
            "noNewPrivileges": True,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*quiet, "mode=1777"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*quiet, "ro"]},
            {"destination": "/run", "type": "tmpfs", "source": "run", "options": ["nosuid", "mode=755"]},
            {"destination": "/shared", "type": "bind", "source": str(shared), "options": ["rbind"]},
            *binds,
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
        "annotations": {"org.criu.config": str(options)},
    }


def _start(container: Container, verb: str, *arguments: str) -> float:
    """``runc run`` or ``restore``, detached; seconds. CRIU wants pipes as standard input and output."""
    pid_file = container.folder / "pid"
    output, theirs = os.pipe()
    input_, ours = os.pipe()
    container.stdio = [output, ours]
    arguments = ("--detach", f"--bundle={container.folder}", f"--pid-file={pid_file}", *arguments)
    seconds = _runc(container, verb, *arguments, stdin=input_, stdout=theirs)
    os.close(theirs)
    os.close(input_)
    container.pid = int(pid_file.read_text())
    return seconds


def _runc(container: Container, verb: str, *arguments: str, stdin: int = -3, stdout: int = -3) -> float:
    started = time.monotonic()
    argv = container.runc.argv(verb, *arguments, container.name, log=container.folder.parent / "runc.log")
    done = subprocess.run(
        argv, env=container.runc.environment(), stdin=stdin, stdout=stdout, stderr=stdout, check=False
    )
    if done.returncode:
        raise EngineError(f"runc {verb} failed", hint=_tail(container.folder.parent, container))
    return time.monotonic() - started


def _tail(work: Path, container: Container) -> str:
    logs = [work / "runc.log", work / "dump.log", work / "restore.log"]
    lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return " | ".join([*errors[-5:], container.last_words() if container.stdio else ""])


def _end(container: Container) -> None:
    """Kill and delete it; nothing to do for one that never started."""
    if container.stdio:
        argv = container.runc.argv("delete", "--force", container.name)
        subprocess.run(argv, check=False, capture_output=True)
        for number in container.stdio:
            os.close(number)
        container.stdio = []


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"{' '.join(argv)}: {done.stderr.strip()}", hint="see mount(8) and the kernel log")


def _version(binary: Path | None) -> str:
    if binary is None or not (shutil.which(str(binary)) or binary.exists()):
        return ""
    done = subprocess.run([str(binary), "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found.group() if found else ""
