"""CRIU and the pager without a container around them: freeze a program, revive it in every way, look at its pages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from relume.images import read_image
from relume.images.integrity import record
from relume.linux import cgroup, process
from relume.pager.job import Job

PAGE = 4096

#: The pager says nothing after one of these.
ENDS = ("failed", "filled", "gone")

SOURCE = Path(__file__).parent
ROOT = SOURCE.parents[1]
OPTIONS = (
    *("--link-remap", "--ghost-limit", "1073741824", "--file-locks", "--network-lock", "skip"),
    "--manage-cgroups=ignore",
)


def criu() -> str:
    """The CRIU that script/bootstrap set up, or the one in PATH."""
    for candidate in (os.environ.get("RELUME_CRIU"), "/opt/relume/bin/criu", shutil.which("criu")):
        if candidate and Path(candidate).exists():
            return candidate
    raise AssertionError("no CRIU on this machine: run script/bootstrap")


def compile_program(source: Path, target: Path) -> Path:
    """Compiles a C program of this folder."""
    subprocess.run(["cc", "-O1", "-pthread", "-o", target, source], check=True)
    return target


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Raises AssertionError with ``what`` when ``condition`` does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


@dataclass
class PagerProcess:
    """A running ``python -m relume.pager --control``, and the events it sent so far."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    events: list[dict[str, Any]] = field(default_factory=list)
    _partial: bytes = b""

    @property
    def pager_pid(self) -> int:
        """The holder's only child."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def send(self, **command: Any) -> None:
        """Nothing comes of it when the pager has ended meanwhile: its last event says how."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.control.sendall(json.dumps(command).encode() + b"\n")

    def event(self, name: str, seconds: float = 20.0) -> dict[str, Any]:
        """Waits for the event ``name``. Raises AssertionError when another end comes first."""
        deadline = time.monotonic() + seconds
        while True:
            for event in self.events:
                if event["event"] == name:
                    return event
            assert not self.events or self.events[-1]["event"] not in ENDS, self.events
            self._receive(name, deadline)

    def end(self, seconds: float = 20.0) -> str:
        """Waits for its last event; which it was."""
        deadline = time.monotonic() + seconds
        while not self.events or self.events[-1]["event"] not in ENDS:
            self._receive("an end", deadline)
        return str(self.events[-1]["event"])

    def _receive(self, what: str, deadline: float) -> None:
        self.control.settimeout(max(0.01, deadline - time.monotonic()))
        received = self.control.recv(65536)
        assert received, f"the pager is gone without {what}: {self.events}"
        *lines, self._partial = (self._partial + received).split(b"\n")
        self.events += map(json.loads, lines)

    def close(self) -> None:
        self.control.close()
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(self.pager_pid, signal.SIGKILL)
            self.process.wait(15)


class Checkpoint:
    """A frozen process tree: its images, and the ways to bring it back. One copy at a time: the pids are taken."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self.images = images
        self.pids = [task.pid for task in read_image(images / "pstree.img")]
        self._runs = 0
        # Where the kernel writes the number of the processor it runs a thread on (struct rseq, 32 bytes).
        cores = [read_image(path)[0] for path in images.glob("core-*.img")]
        self._rseq = {core.thread_core.rseq_entry.rseq_abi_pointer for core in cores}

    @classmethod
    def take(cls, pid: int, folder: Path) -> Checkpoint:
        """Freezes ``pid`` and its children, and ends them."""
        process.become_subreaper()
        images = folder / "images"
        images.mkdir()
        command = [criu(), "dump", "-t", str(pid), "-D", images, "-o", "dump.log", "-v4", *OPTIONS]
        done = subprocess.run(command, capture_output=True)
        assert done.returncode == 0, _log(images / "dump.log")
        checkpoint = cls(folder, images)
        checkpoint.kill()
        return checkpoint

    @contextlib.contextmanager
    def pager(self, within: str | None = None, **options: Any) -> Iterator[PagerProcess]:
        """A pager with a job for this checkpoint, listening. ``options`` are the Job's, ``within`` its own cgroup."""
        self._runs += 1
        work = self.folder / f"work-{self._runs}"
        work.mkdir()
        ours, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        started = subprocess.Popen(
            [sys.executable, "-m", "relume.pager", "--control", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            preexec_fn=_enter(within),
        )
        theirs.close()
        pager = PagerProcess(started, ours)
        try:
            ours.sendall(Job(self.images, work, **options).line().encode() + b"\n")
            pager.event("listening")
            yield pager
        finally:
            pager.close()
            self.kill()

    def restore(
        self, *, lazy: bool, stopped: bool = False, within: str | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """``criu restore``, detached, in the cgroup ``within``. ``stopped`` leaves every task before its start."""
        work = self.folder / f"work-{self._runs}" if lazy else self.folder
        command = [
            criu(),
            "restore",
            "-d",
            "-D",
            self.images,
            "-W",
            work,
            "-o",
            "restore.log",
            "-v4",
            *OPTIONS,
        ]
        if lazy:
            command.append("--lazy-pages")
        if stopped:
            command.append("--leave-stopped")
        return subprocess.run(command, capture_output=True, timeout=120, preexec_fn=_enter(within))

    def kill(self) -> None:
        """Ends what is alive of the tree, children forked since included, those without a parent too."""
        try:
            wait_until(self._are_gone, 20, "the pids are free")
        except AssertionError as error:
            raise AssertionError(f"{error}; left: {_described(self._family())}") from None

    def _are_gone(self) -> bool:
        """Kills again each time: one that dies may have been forking, and nobody lists processes in one moment."""
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not any(map(self._taken, self.pids))

    def _family(self) -> set[int]:
        return {pid for root in self.pids for pid in (root, *_descendants(root))} | _members(self.pids)

    def _taken(self, pid: int) -> bool:
        _reap(self.pids)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, 0)
            return True
        return Path(f"/proc/{pid}").exists()

    def pages(self) -> dict[tuple[int, int], bytes]:
        """A hash of every page of private anonymous memory of every process, by (pid, address)."""
        return {
            (pid, address): digest for pid in self.pids for address, digest in _anonymous(pid, self._rseq)
        }


def _enter(group: str | None) -> Callable[[], None] | None:
    """What a child calls to be in ``group`` from before its first instruction."""
    if group is None:
        return None
    files = [directory / "cgroup.procs" for directory in cgroup.directories(group)]

    def enter() -> None:
        for file in files:
            file.write_text(str(os.getpid()))

    return enter


def frozen_torture(folder: Path, seed: int, workers: int, megabytes: int, steps: int) -> Checkpoint:
    """A checkpoint of the torture program (torture.c), frozen before its first step, with its hashes."""
    program = compile_program(SOURCE / "torture.c", folder / "torture")
    arguments = [str(program), str(folder), str(workers), str(megabytes), str(seed), str(steps)]
    null = subprocess.DEVNULL
    started = subprocess.Popen(
        arguments, cwd=folder, stdin=null, stdout=null, stderr=null, start_new_session=True
    )
    wait_until(lambda: len(list(folder.glob("ready.*"))) == workers + 1, 60, "the program is ready")
    checkpoint = Checkpoint.take(started.pid, folder)
    started.poll()
    record(checkpoint.images)
    return checkpoint


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _anonymous(pid: int, rseq: set[int]) -> Iterator[tuple[int, bytes]]:
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            fields = line.split()
            if (
                fields[1][3] != "p"
                or (len(fields) > 5 and fields[5] != "[heap]")
                or fields[1].startswith("---")
            ):
                continue
            start, end = (int(bound, 16) for bound in fields[0].split("-"))
            for block in range(start, end, 1 << 20):
                length = min(1 << 20, end - block)
                content = bytearray(os.pread(memory.fileno(), length, block))
                assert len(content) == length, f"{pid}: {block:#x} cannot be read"
                for address in rseq:
                    if block <= address < block + length:
                        content[address - block : address - block + 32] = bytes(32)
                for offset in range(0, length, PAGE):
                    yield block + offset, blake3(content[offset : offset + PAGE]).digest()[:16]


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it may end meanwhile
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for child in task.read_text().split():
                    found += [int(child), *_descendants(int(child))]
    return found


def _members(groups: list[int]) -> set[int]:
    """The processes of these process groups."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[2]) in groups:
                found.add(int(stat.parent.name))
    return found


def _described(pids: set[int]) -> list[str]:
    """What each of these processes is, and what each of its threads does."""
    found = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            wanted = ("Name", "State", "PPid", "Threads")
            threads = [
                " ".join((task.name, _text(task / "wchan"), _text(task / "syscall")))
                for task in Path(f"/proc/{pid}/task").iterdir()
            ]
            facts = " ".join(line.replace("\t", " ") for line in status if line.split(":")[0] in wanted)
            found.append(f"{pid}: {facts}; {threads}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:  # a zombie has none
        return str(error.strerror)


def _reap(groups: list[int]) -> None:
    """Waits for orphans of these process groups: their pids are needed again, and init takes its time."""
    for pid in map(int, Path("/proc/thread-self/children").read_text().split()):
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.getpgid(pid) in groups:
                os.waitpid(pid, os.WNOHANG)


def _log(path: Path) -> str:
    return "\n".join(line for line in path.read_text(errors="replace").splitlines() if "Error" in line)
