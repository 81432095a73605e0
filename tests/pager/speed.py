"""How soon a program is through with its memory, by each way of giving it back. CRIU only, no container.

    PYTHONPATH=src .venv/bin/python tests/pager/speed.py [--held MB] [--touched MB] [--runs N]

The ways are interleaved: run one of each, then the next round. Prints medians. As root.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from harness import SOURCE, Checkpoint, compile_program, wait_until

WAYS = ("eager", "first", "learned")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held", type=int, default=1664)
    parser.add_argument("--touched", type=int, default=448)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        program = compile_program(SOURCE / "touch.c", folder / "touch")
        null = subprocess.DEVNULL
        command = [program, folder, str(options.held), str(options.touched)]
        process = subprocess.Popen(
            command, cwd=folder, stdin=null, stdout=null, stderr=null, start_new_session=True
        )
        wait_until((folder / "ready").exists, 120, "the program is ready")
        checkpoint = Checkpoint.take(process.pid, folder)
        process.poll()
        (folder / "go").touch()
        print(f"{options.held} MB held, {options.touched} MB touched, median of {options.runs} [s]")
        for cache in ("warm", "dropped"):
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            rates: list[float] = []
            for _ in range(options.runs):
                for way in WAYS:
                    _prepare(checkpoint.images, cache)
                    seconds, rate = _measure(checkpoint, folder, way)
                    found[way].append(seconds)
                    rates += [rate] if rate else []
            medians = "  ".join(f"{way} {statistics.median(times):.3f}" for way, times in found.items())
            print(f"{cache:8} {medians}  (replay at {statistics.median(rates) / 1e9:.1f} GB/s)")


def _prepare(images: Path, cache: str) -> None:
    if cache == "dropped":
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    else:
        for path in images.iterdir():
            path.read_bytes()


def _measure(checkpoint: Checkpoint, folder: Path, way: str) -> tuple[float, float]:
    """(seconds from the start of CRIU until the program was through, bytes a second of the replay)."""
    done, learned = folder / "done", folder / "working-set"
    done.unlink(missing_ok=True)
    rate = 0.0
    if way == "eager":
        began = time.time()
        assert checkpoint.restore(lazy=False).returncode == 0
        wait_until(done.exists, 60, way)
    else:
        if way == "first":
            learned.unlink(missing_ok=True)
        with checkpoint.pager(working_set=learned, record=learned, fill="demand") as pager:
            began = time.time()
            assert checkpoint.restore(lazy=True).returncode == 0
            wait_until(done.exists, 60, way)
            pager.send(command="first_answer")
            pager.event("recorded")
            for event in pager.events:
                if event["event"] == "replayed" and event["copy_seconds"]:
                    rate = event["bytes"] / event["copy_seconds"]
    checkpoint.kill()
    return float(done.read_text().split()[0]) - began, rate


if __name__ == "__main__":
    main()
