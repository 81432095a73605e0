"""``script/gpu-check``'s last steps: the GPU path through runc and CRIU, from a running container into a copy of it.

As small as it can be, to show where a fault lies: the machine's own root filesystem under an overlay, no network, no
user namespace, one process. The original is checkpointed, resumed and asked; then it is ended, and a copy restored from
the images is given its GPU and asked the same. Once CRIU reads all memory itself, once relume's pager brings it in.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import re
import shutil
import socket
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

_MIN_CRIU: Final = (4, 2)  # script/lib/common.sh says why
_CRIU_OPTIONS: Final = "ext-unix-sk\nlink-remap\nfile-locks\nnetwork-lock skip\ntcp-close\n"
_ANSWER_S: Final = 600.0
_PLACES: Final = [path for path in map(Path, ("/var/tmp", "/tmp", "/run")) if path.is_dir()]
_PAGER_NEEDS: Final = ("blake3", "google.protobuf")
_CAPABILITIES: Final = (
    ("CAP_SYS_ADMIN", 21, "mounts and namespaces"),
    ("CAP_SYS_PTRACE", 19, "CRIU stops the process by ptrace"),
    ("CAP_NET_ADMIN", 12, "the container's network namespace"),
    ("CAP_SYS_CHROOT", 18, "the container's root"),
)


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


async def container_step(
    driver: DriverHelper, requirements: Requirements, size: int, *, paged: bool
) -> dict[str, Any]:
    """The step's report. Raises RelumeError when something fails; nothing is left behind either way."""
    gpu, edits = requirements.gpu, requirements.edits
    checkpointer = GpuCheckpointer(driver)
    place = max(_PLACES, key=lambda path: shutil.disk_usage(path).free)
    size = min(size, shutil.disk_usage(place).free // 3)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relume-gpu-", dir=place)))
        runc = replace(requirements.runc, root=work / "runc")
        images, options = work / "images", work / "criu.conf"
        (work / "plugins").mkdir()
        # An empty plugin folder: CRIU's own CUDA plugin would do at its own moments what we do at ours.
        options.write_text(f"{_CRIU_OPTIONS}libdir {work / 'plugins'}\n")
        original = stack.enter_context(_bundle(runc, work, "original", edits, options))
        _start(original, "run")
        await original.ask("fill", size=size, blocks=4, seed=size)
        await original.ask("register", size=16 << 20)
        bus = await original.ask("bandwidth", size=min(size, 256 << 20))
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
        # On cgroup version 2 nobody else tells CRIU that a copy has a group of its own (relume.engine.options).
        with options.open("a") as file:
            file.write(f"cgroup-root /{copy.name}\n")
        pager = _Pager(images, work) if paged else None
        if pager is not None:
            stack.callback(pager.close)
            pager.event("listening")
        lazy = ["--lazy-pages"] if paged else []
        restore_s = _start(copy, "restore", f"--image-path={images}", f"--work-path={work}", *lazy)
        whole = pager.event("whole") if pager is not None else {}
        returned = await checkpointer.restore([copy.pid], {gpu.uuid: gpu.uuid}, expected=1)
        same = await copy.ask("hash") == before
        pinned = (await copy.ask("pinned"))["equal"]
        return {
            "ok": went_on and same and pinned,
            "registered_memory_equal": pinned,
            **({"paged_bytes": whole["bytes"], "paged_copy_s": whole["copy_seconds"]} if whole else {}),
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
            "gpu_restore_rate": int(size / max(returned.restore_s, 1e-9)),
            "pinned_to_device_rate": int(bus["to_device"]),
            "runc": _version(runc.binary),
            "criu": _version(runc.criu),
        }


class _Pager:
    """A ``relume.pager``, a process with its job as JSON: the container's only process, 1, has to come whole."""

    def __init__(self, images: Path, work: Path) -> None:
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "relume.pager", "--control", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        threads = max(2, min(8, (os.cpu_count() or 2) // 2))
        job = {"images": str(images), "work_dir": str(work), "whole": [1], "threads": threads}
        self._ours.sendall(json.dumps(job).encode() + b"\n")
        self._events = self._ours.makefile("rb")
        self._ours.settimeout(_ANSWER_S)

    def event(self, name: str) -> dict[str, Any]:
        """The event ``name``, when it comes. Raises EngineError when the pager ends before."""
        last = ""
        for line in self._events:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
            last = str(event)
        raise EngineError(f"the pager ended before {name!r}: {last}")

    def close(self) -> None:
        self._events.close()
        self._ours.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def container_requirements(
    machine: Machine, registry: cdi.Registry, *, paged: bool = False
) -> tuple[list[str], Requirements | None]:
    """What is missing here, in words; and what there is, if nothing is."""
    missing: list[str] = []
    if os.geteuid() != 0:
        missing.append("root")
    else:
        missing += [f"{name} ({why})" for name, bit, why in _CAPABILITIES if not _capable(bit)]
        missing += _cannot_mount() if not missing else []
    if paged:
        missing += [
            f"the Python package {name}, for this Python" for name in _PAGER_NEEDS if not _importable(name)
        ]
    runc: Runc | None = None
    try:
        runc = Runc(find_runc(), Path("/run/relume-gpu"), find_criu())
        version = tuple(int(part) for part in re.findall(r"\d+", _version(runc.criu))[:2])
        if version < _MIN_CRIU:
            missing.append(f"CRIU 4.2 or newer (this is {_version(runc.criu) or 'none that runs'})")
        elif os.geteuid() == 0:
            missing += _criu_says(runc.criu)
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


def _capable(bit: int) -> bool:
    """Whether a capability is in our effective set (numbers of capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    return bool(int(effective, 16) >> bit & 1)


def _cannot_mount() -> list[str]:
    """Tries what ``_bundle`` does, in a mount namespace that goes with the try; and whether runc can make a cgroup."""
    with tempfile.TemporaryDirectory(prefix="relume-gpu-") as folder:
        mounts = (
            f"mount -t tmpfs tmpfs {folder} && cd {folder} && mkdir u w r && "
            "mount -t overlay -o lowerdir=/,upperdir=u,workdir=w overlay r"
        )
        tried = subprocess.run(
            ["unshare", "--mount", "sh", "-c", mounts], check=False, capture_output=True, text=True
        )
    missing = [f"the right to mount an overlay of /: {tried.stderr.strip()}"] if tried.returncode else []
    groups = Path("/sys/fs/cgroup")
    if not groups.is_dir() or os.statvfs(groups).f_flag & os.ST_RDONLY:
        missing.append(f"a cgroup file system at {groups} that can be written to")
    return missing


def _criu_says(criu: Path | None) -> list[str]:
    """What `criu check` misses, its last error; nothing where it is content."""
    done = subprocess.run([str(criu), "check"], check=False, capture_output=True, text=True)
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
    return [f"what `criu check` asks for: {errors[-1].strip()}"] if done.returncode and errors else []


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


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
        config = cdi.apply(_config(container, options), edits)
        (folder / "config.json").write_text(json.dumps(config))
        yield container
    finally:
        _end(container)
        subprocess.run(["umount", "-l", str(folder / "root")], check=False, capture_output=True)
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def _config(container: Container, options: Path) -> dict[str, Any]:
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
        "root": {"path": str(container.folder / "root"), "readonly": False},
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
            {"destination": "/shared", "type": "bind", "source": str(container.shared), "options": ["rbind"]},
            *binds,
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "cgroupsPath": f"/{container.name}",
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
