"""The pager against CRIU itself: the same checkpoint, eagerly and lazily, must be the same memory, always."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pager.harness import Checkpoint, frozen_torture, running, wait_until
from relume.images import read_pagemap
from relume.pager import working_set
from relume.pager.working_set import Piece, WorkingSet

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="CRIU needs root"),
    pytest.mark.timeout(120),
]

WORKERS = 2
MEGABYTES = 72
STEPS = 250


class Torture:
    """The frozen torture program (tests/pager/torture.c)."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.checkpoint = frozen_torture(folder, seed, WORKERS, MEGABYTES, STEPS)

    def go(self) -> None:
        for path in [*self.folder.glob("done.*"), *self.folder.glob("bad.*")]:
            path.unlink()
        (self.folder / "go").touch()

    def wait(self) -> None:
        """Until every process went through its steps. Raises AssertionError with what one of them found wrong."""
        wait_until(lambda: self.wrong or len(list(self.folder.glob("done.*"))) == WORKERS + 1, 60, "torture")
        assert not self.wrong

    @property
    def wrong(self) -> list[str]:
        return [path.read_text() for path in self.folder.glob("bad.*")]

    def some_working_set(self, seed: int) -> Path:
        """A made-up one: half of the image, in random order, so that the replay meets every event."""
        rng = random.Random(seed)
        pagemaps = [read_pagemap(self.checkpoint.images, pid) for pid in self.checkpoint.pids]
        pieces: list[Piece] = []
        for pagemap in pagemaps:
            pages_id = int(pagemap.pages.stem.rpartition("-")[2])
            pieces += [
                Piece(pages_id, offset, min(1 << 18, extent.offset + extent.length - offset))
                for extent in pagemap.lazy
                for offset in range(extent.offset, extent.offset + extent.length, 1 << 18)
                if rng.random() < 0.5
            ]
        rng.shuffle(pieces)
        images = {int(each.pages.stem.rpartition("-")[2]): each.pages_bytes for each in pagemaps}
        path = self.folder / f"set-{seed}"
        working_set.save(path, WorkingSet(images, tuple(pieces)))
        return path


@pytest.fixture(scope="module")
def torture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Torture]:
    made = Torture(tmp_path_factory.mktemp("torture"), seed=1)
    yield made
    made.checkpoint.kill()


@pytest.fixture(autouse=True)
def _nothing_said(torture: Torture) -> None:
    (torture.folder / "go").unlink(missing_ok=True)


def test_every_page_of_every_process_is_the_same(torture: Torture) -> None:
    """Nothing runs: the tasks are left stopped, so eager and lazy memory must be equal byte for byte."""
    checkpoint = torture.checkpoint
    assert checkpoint.restore(lazy=False, stopped=True).returncode == 0
    eager = checkpoint.pages()
    checkpoint.kill()
    runtime = torture.folder / "runtime"
    with checkpoint.pager(verify=runtime, working_set=torture.some_working_set(5)) as pager:
        assert checkpoint.restore(lazy=True, stopped=True).returncode == 0
        pager.event("replayed")
        pager.send(command="first_answer")
        filled = pager.event("filled")
        assert pager.process.wait(10) == 0
        lazy = checkpoint.pages()
    assert filled["hashed_bytes"] > 0
    assert eager.keys() == lazy.keys()
    different = [key for key in eager if eager[key] != lazy[key]]
    assert not different, f"{len(different)} of {len(eager)} pages, first {different[0]}"


def test_huge_pages_come_back(torture: Torture) -> None:
    """Where every eleventh page is a hole: not while it is registered, and again when the memory is in."""
    checkpoint = torture.checkpoint
    pid = checkpoint.pids[0]
    with checkpoint.pager() as pager:
        assert checkpoint.restore(lazy=True, stopped=True).returncode == 0
        pager.event("restored")
        start = _advised_huge(pid)
        assert _collapse(pid, start) != 0, "a hole of registered memory is the pager's to fill"
        pager.send(command="first_answer")
        pager.event("filled", 60)
        assert pager.process.wait(10) == 0
        before = _read(pid, start, 2 << 20)
        if (error := _collapse(pid, start)) == errno.EINVAL:
            pytest.skip("no MADV_COLLAPSE here (before Linux 6.1, or without huge pages)")
        assert error == 0
        smaps = Path(f"/proc/{pid}/smaps").read_text()
        assert any(int(size) >= 2048 for size in re.findall(r"AnonHugePages:\s+(\d+) kB", smaps))
        assert _read(pid, start, 2 << 20) == before


@pytest.mark.parametrize(
    ("threads", "replay", "fill", "delay"),
    [(2, True, "all", 0.0), (4, True, "all", 0.02), (1, False, "all", 0.0), (2, True, "demand", 0.0)],
)
def test_the_torture_passes_while_memory_comes_in(
    torture: Torture, threads: int, replay: bool, fill: str, delay: float
) -> None:
    torture.go()
    learned = torture.some_working_set(threads) if replay else None
    with torture.checkpoint.pager(threads=threads, working_set=learned, fill=fill) as pager:
        assert torture.checkpoint.restore(lazy=True).returncode == 0
        pager.event("restored")
        time.sleep(delay)
        pager.send(command="first_answer")
        torture.wait()
        if fill == "demand":
            torture.checkpoint.kill()  # it has looked at all of its memory; the pager may be gone already
        assert pager.process.wait(20) == 0


def test_the_program_ends_in_the_middle(torture: Torture) -> None:
    for _ in range(5):  # until the fill is not over before
        torture.go()
        with torture.checkpoint.pager() as pager:
            assert torture.checkpoint.restore(lazy=True).returncode == 0
            pager.event("restored")
            pager.send(command="first_answer")
            time.sleep(0.02)
            torture.checkpoint.kill()
            end = pager.end()
            assert pager.process.wait(20) == 0
        if end == "gone":
            return
        assert end == "filled"
    raise AssertionError("the fill was over each time")


def test_stop_ends_what_is_left(torture: Torture) -> None:
    torture.go()
    with torture.checkpoint.pager(fill="demand") as pager:
        assert torture.checkpoint.restore(lazy=True).returncode == 0
        pager.event("restored")
        pager.send(command="stop")
        assert pager.event("gone")["reason"] == "stopped"
        assert not any(map(running, torture.checkpoint.pids))
        assert not torture.wrong


def test_a_first_restore_learns_and_the_next_replays(torture: Torture) -> None:
    torture.go()
    learned = torture.folder / "learned"
    with torture.checkpoint.pager(record=learned, working_set=learned) as pager:
        assert torture.checkpoint.restore(lazy=True).returncode == 0
        torture.wait()
        pager.send(command="first_answer")
        first = pager.event("recorded")
        pager.event("filled")
    assert first["bytes"] > 0
    torture.go()
    with torture.checkpoint.pager(record=learned, working_set=learned) as pager:
        assert torture.checkpoint.restore(lazy=True).returncode == 0
        replayed = pager.event("replayed")
        torture.wait()
        pager.send(command="first_answer")
        second = pager.event("recorded")
        pager.event("filled")
    assert replayed["bytes"] > first["bytes"] / 2
    assert second["missed"] < first["missed"] / 2


@pytest.mark.parametrize("victim", ["pager", "holder"])
def test_nobody_runs_on_zeros_when_the_pager_is_killed(torture: Torture, victim: str) -> None:
    checkpoint = torture.checkpoint
    for delay in (0.0, 0.01, 0.05):
        torture.go()
        with checkpoint.pager(fill="demand") as pager:
            target = pager.pager_pid if victim == "pager" else pager.process.pid
            assert checkpoint.restore(lazy=True).returncode == 0
            pager.event("restored")
            time.sleep(delay)
            os.kill(target, signal.SIGKILL)
            wait_until(lambda: not any(map(running, checkpoint.pids)), 10, "the instance is killed")
            assert not torture.wrong
            if victim == "pager":
                assert "signal 9" in pager.event("failed")["reason"]
                assert pager.process.wait(10) == 1


def test_a_flipped_bit_is_found_before_it_is_memory(torture: Torture) -> None:
    checkpoint = torture.checkpoint
    pages = read_pagemap(checkpoint.images, checkpoint.pids[0])
    where = max(pages.lazy, key=lambda extent: extent.length).offset + 12345
    _flip(pages.pages, where)
    try:
        torture.go()
        with checkpoint.pager(verify=torture.folder / "other-runtime") as pager:
            # What CRIU returns is not asked: the first process that it lets go may end all of them at once.
            checkpoint.restore(lazy=True)
            pager.event("restored")
            pager.send(command="first_answer")
            assert "not what was written" in pager.event("failed")["reason"]
            assert not any(map(running, checkpoint.pids))
            assert not torture.wrong
    finally:
        _flip(pages.pages, where)


def test_a_pages_file_cut_short_under_way(torture: Torture) -> None:
    checkpoint = torture.checkpoint
    pages = read_pagemap(checkpoint.images, checkpoint.pids[0]).pages
    content = pages.read_bytes()
    try:
        with checkpoint.pager() as pager:
            assert checkpoint.restore(lazy=True).returncode == 0
            pager.event("restored")
            os.truncate(pages, len(content) // 2 & -4096)
            pager.send(command="first_answer")
            assert pager.event("failed")["reason"]
            assert not any(map(running, checkpoint.pids))
            assert not torture.wrong
    finally:
        pages.write_bytes(content)


def test_a_pages_file_that_is_short_from_the_start(torture: Torture) -> None:
    checkpoint = torture.checkpoint
    pages = read_pagemap(checkpoint.images, checkpoint.pids[0]).pages
    content = pages.read_bytes()
    try:
        os.truncate(pages, len(content) - 4096)
        with checkpoint.pager() as pager:
            assert "is short" in pager.event("failed")["reason"]
            assert checkpoint.restore(lazy=True).returncode != 0
    finally:
        pages.write_bytes(content)


def _advised_huge(pid: int) -> int:
    """The first multiple of 2 MiB in the mapping that has MADV_HUGEPAGE and 2 MiB behind it."""
    low = high = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(bound, 16) for bound in mapping.groups())
        elif line.startswith("VmFlags:") and " hg" in line:
            start = -(-low // (2 << 20)) * (2 << 20)
            if start + (2 << 20) <= high:
                return start
    raise AssertionError("no such mapping")


def _collapse(pid: int, start: int) -> int:
    """process_madvise(2), MADV_COLLAPSE, of 2 MiB; the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    descriptor = os.pidfd_open(pid)
    piece = (ctypes.c_size_t * 2)(start, 2 << 20)
    call = (440, descriptor, piece, ctypes.c_size_t(1), 25, 0)
    result = libc.syscall(*call)
    error = ctypes.get_errno()
    os.close(descriptor)
    return 0 if result >= 0 else error


def _read(pid: int, start: int, length: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, start)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def unpinnable(checkpoint: Checkpoint, pid: int) -> int:
    """Lazy pages that get_user_pages under the mmap lock cannot have, as a driver that pins memory asks for them.

    Reading /proc/PID/mem is such a call (__access_remote_vm): EIO where a userfaultfd would have to be waited for.
    """
    missing = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for extent in read_pagemap(checkpoint.images, pid).lazy:
            for address in range(extent.address, extent.end, 4096):
                try:
                    memory.seek(address)
                    memory.read(1)
                except OSError as error:
                    assert error.errno == errno.EIO
                    missing += 1
    return missing


def test_what_comes_whole_can_be_pinned(torture: Torture) -> None:
    checkpoint = torture.checkpoint
    first, *others = checkpoint.pids
    record = torture.folder / "not-learned"
    with checkpoint.pager(fill="demand", whole=(first,), threads=3, record=record) as pager:
        assert checkpoint.restore(lazy=True, stopped=True).returncode == 0
        whole = pager.event("whole")
        lazy = sum(extent.length for extent in read_pagemap(checkpoint.images, first).lazy)
        assert 0.9 * lazy < whole["bytes"] <= lazy  # a few pages came by faults before
        assert whole["copy_seconds"] > 0
        assert unpinnable(checkpoint, first) == 0
        assert unpinnable(checkpoint, others[0]) > 1000  # the rest is as lazy as ever
        pager.send(command="first_answer")
        assert pager.event("recorded")["bytes"] < lazy


def test_the_torture_passes_while_all_of_one_process_comes_in(torture: Torture) -> None:
    torture.go()
    checkpoint = torture.checkpoint
    with checkpoint.pager(whole=tuple(checkpoint.pids), threads=3) as pager:
        assert checkpoint.restore(lazy=True).returncode == 0
        pager.event("whole")
        pager.send(command="first_answer")
        torture.wait()
        pager.event("filled")
