"""Many restores of the torture program, short of memory, with the pager or its holder killed at random.

Four cgroups: one around all, limited, in which three compete: the instance, with a limit of its own that is near what
it needs; the pager, so that the page cache of the images is not free of charge; and a neighbour, which takes more than
there is, and reads files. Nothing of the machine outside is short of anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pager.harness import (
    PagerProcess,
    frozen_torture,
    running,
    wait_until,
)
from relume.linux import cgroup

WORKERS = 1
MEGABYTES = 24
STEPS = 60
SECONDS = 60.0
"""For one restored instance to look at all of its memory; longer is hanging."""

_MIB = 1 << 20
_PAGER_BYTES = 48 * _MIB
"""Python, twice, and some page cache."""

_NEIGHBOUR_BYTES = 48 * _MIB
_NEIGHBOUR = f"""
import sys, time
while True:
    block = b"x" * {_NEIGHBOUR_BYTES}
    with open(sys.argv[1], "rb") as file:
        while file.read(1 << 20):
            pass
    del block
    time.sleep(0.05)
"""


class Groups:
    """The cgroups of one soak."""

    def __init__(self) -> None:
        self.around = f"/relume-soak-{os.urandom(4).hex()}"
        self.instance, self.pager, self.neighbour = (
            f"{self.around}/{name}" for name in ("instance", "pager", "neighbour")
        )
        for root in cgroup.hierarchies():
            if cgroup.unified():
                _control(root)
            elif not (root / "memory.limit_in_bytes").exists():
                continue
            (root / self.around[1:]).mkdir()
            if cgroup.unified():
                _control(root / self.around[1:])
            for group in (self.instance, self.pager, self.neighbour):
                (root / group[1:]).mkdir()

    def limit(self, group: str, size: int) -> None:
        """Bytes that all in ``group`` may be charged for."""
        for directory in cgroup.directories(group):
            for name in ("memory.max", "memory.limit_in_bytes"):
                if (directory / name).exists():
                    (directory / name).write_text(str(size))

    def peak(self, group: str) -> int:
        """The most bytes that were charged to ``group``."""
        for directory in cgroup.directories(group):
            for name in ("memory.peak", "memory.max_usage_in_bytes"):
                with contextlib.suppress(FileNotFoundError):
                    return int((directory / name).read_text())
        raise AssertionError(f"{group} does not count its memory")

    def oom_kills(self, group: str) -> int:
        """How often the kernel killed a process of ``group`` for its memory."""
        for directory in cgroup.directories(group):
            for name in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(FileNotFoundError):
                    for line in (directory / name).read_text().splitlines():
                        if line.startswith("oom_kill "):
                            return int(line.split()[1])
        return 0

    def close(self) -> None:
        cgroup.kill(self.around)
        cgroup.remove(self.around)


def _control(directory: Path) -> None:
    (directory / "cgroup.subtree_control").write_text("+memory")


class Neighbour:
    """Takes memory and page cache again and again, and is the first to be killed for it."""

    def __init__(self, groups: Groups, reads: Path) -> None:
        self._groups = groups
        self._reads = reads
        self._over = threading.Event()
        self.deaths = 0
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        enter = " && ".join(
            f"echo $$ >{directory}/cgroup.procs" for directory in cgroup.directories(self._groups.neighbour)
        )
        script = f'{enter} && echo 1000 >/proc/self/oom_score_adj && exec nice -n 10 "$@"'
        while not self._over.is_set():
            process = subprocess.Popen(
                ["sh", "-c", script, "sh", sys.executable, "-c", _NEIGHBOUR, str(self._reads)],
                stderr=subprocess.DEVNULL,
            )
            while process.poll() is None and not self._over.wait(0.05):
                pass
            if process.poll() is None:
                process.kill()
            else:
                self.deaths += 1
            process.wait()

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class Soak:
    """One checkpoint of the torture program, to be restored again and again. Raises AssertionError for a wrong byte."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.groups = Groups()
        self._neighbour: Neighbour | None = None
        self.checkpoint = frozen_torture(folder, seed, WORKERS, MEGABYTES, STEPS)
        self.need, self.usual = self._measure()

    def _measure(self) -> tuple[int, float]:
        """(the bytes an instance is charged for, the seconds it takes) when nothing is short."""
        self._go()
        began = time.monotonic()
        with self._pager() as pager:
            assert self.checkpoint.restore(lazy=True, within=self.groups.instance).returncode == 0
            pager.send(command="first_answer")
            wait_until(self._through, SECONDS, "the program is through")
            took = time.monotonic() - began
            self._end(pager)
        assert not self.wrong, self.wrong
        return self.groups.peak(self.groups.instance), took

    def run(self, count: int) -> dict[str, int]:
        """``count`` restores; returns how many came to which end."""
        around = self.need + _PAGER_BYTES + _NEIGHBOUR_BYTES - 8 * _MIB
        self.groups.limit(self.groups.around, around)
        self._neighbour = Neighbour(self.groups, max(self.checkpoint.images.iterdir(), key=_size))
        for number in range(count):
            outcome = self._once(number)
            self.outcomes[outcome] += 1
            if number % 25 == 24:
                print(f"{number + 1} of {count}: {dict(self.outcomes)}", flush=True)
        self._neighbour.close()
        facts = {
            "need_bytes": self.need,
            "limit_around_bytes": around,
            "pager_peak_bytes": self.groups.peak(self.groups.pager),
            "neighbour_killed": self._neighbour.deaths,
        }
        return {"restores": count, **self.outcomes, **facts}

    def close(self) -> None:
        if self._neighbour is not None:
            self._neighbour.close()
        try:
            self.checkpoint.kill()
        finally:
            self.groups.close()

    def _once(self, number: int) -> str:
        choice = self.random
        victim = choice.choice(["nobody", "nobody", "nobody", "pager", "pager", "holder"])
        self.groups.limit(
            self.groups.instance, round(self.need * choice.uniform(1.02, 1.3)) + choice.choice([0, 80 * _MIB])
        )
        if choice.random() < 0.5:
            self._drop_images()
        learned = self.folder / "learned"
        options = {
            "threads": choice.randint(1, 4),
            "fill": choice.choice(["all", "all", "demand"]),
            "working_set": learned,
            "record": learned,
            "verify": self.folder / f"runtime-{number % 7}" if choice.random() < 0.5 else None,
        }
        kills = self._oom_kills()
        self._go()
        what = f"restore {number}, victim {victim}, {options}"
        with self._pager(**options) as pager:
            murder = threading.Timer(choice.uniform(0, self.usual), self._kill, (pager, victim))
            answer = threading.Timer(
                choice.uniform(0, self.usual), pager.send, kwargs={"command": "first_answer"}
            )
            murder.start()
            answer.start()
            try:
                restored = self.checkpoint.restore(lazy=True, within=self.groups.instance).returncode == 0
                wait_until(lambda: self._settled(pager, restored, kills), SECONDS, what)
                whole = self._through()
                self._end(pager)
            finally:
                for timer in (murder, answer):
                    timer.cancel()
                    timer.join()
        assert not self.wrong, f"{what}: {self.wrong}"
        if self._oom_kills() > kills:
            return "out_of_memory"
        if whole:
            return "whole"
        assert victim != "nobody", f"{what}: {pager.events}"
        return f"{victim}_killed"

    def _settled(self, pager: PagerProcess, restored: bool, kills: int) -> bool:
        """Every process is through, or something is wrong, or the instance has ended."""
        if self.wrong or self._through() or not restored:
            return True
        if self._oom_kills() > kills:
            return True
        return pager.process.poll() is not None and not any(map(running, self.checkpoint.pids))

    def _oom_kills(self) -> int:
        """Of the instance, and of pager and holder: between two neighbours there is nobody else to be killed."""
        return sum(map(self.groups.oom_kills, (self.groups.instance, self.groups.pager)))

    def _end(self, pager: PagerProcess) -> None:
        """Nothing of the instance may be left when the pager says so, and the pager may not stay behind."""
        if pager.process.poll() is None and any(map(running, self.checkpoint.pids)):
            pager.send(command="stop")
            # One that is complete has let go of the instance, and does not listen any more.
            wait_until(lambda: pager.process.poll() is not None, 20, "the pager ends")
        cgroup.kill(self.groups.instance)
        wait_until(lambda: pager.process.poll() is not None, 20, "the pager ends")

    @contextlib.contextmanager
    def _pager(self, **options: object) -> Iterator[PagerProcess]:
        with self.checkpoint.pager(within=self.groups.pager, cgroup=self.groups.instance, **options) as pager:
            yield pager

    def _kill(self, pager: PagerProcess, victim: str) -> None:
        with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):
            match victim:
                case "pager":
                    os.kill(pager.pager_pid, signal.SIGKILL)
                case "holder":
                    os.kill(pager.process.pid, signal.SIGKILL)

    def _go(self) -> None:
        for path in [*self.folder.glob("done.*"), *self.folder.glob("bad.*")]:
            path.unlink()
        told = self.folder / "going"
        told.write_text(str(self.random.getrandbits(32)))
        told.rename(self.folder / "go")

    def _through(self) -> bool:
        return len(list(self.folder.glob("done.*"))) == WORKERS + 1

    def _drop_images(self) -> None:
        for path in self.checkpoint.images.glob("pages-*.img"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def wrong(self) -> list[str]:
        return [path.read_text() for path in self.folder.glob("bad.*")]


def _size(path: Path) -> int:
    return path.stat().st_size


def main(folder: Path, count: int) -> None:
    """Prints how far it is, and in the last line what came of it, as JSON."""
    began = time.monotonic()
    seed = int(time.time()) & 0xFFFF
    print(f"seed {seed}", flush=True)
    soak = Soak(folder, seed)
    try:
        facts = soak.run(count)
    finally:
        soak.close()
    print(json.dumps({**facts, "seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
