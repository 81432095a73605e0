#!/usr/bin/env python3
"""Chunk sizes: `bench/store.py`. One JSON row per line on stdout. (`relume bench --region` measures the rest.)

The memory of two runs of a model-like program, changed by one line, cut with several chunk sizes: how many objects,
and how much the second run adds to what the first has stored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from blake3 import blake3

from relume.store import chunks
from relume.store.envelope import zstd

_APP = """
import asyncio, concurrent.futures, ctypes, decimal, http.server, logging, random, sqlite3, sys
import unittest, xml.dom.minidom
weights = [bytearray(random.Random(i).randbytes(8 << 20)) for i in range({layers})]
settings = [{{"key %d" % i: [i, str(i), {{"a": i}}]}} for i in range(60000)]
VERSION = {version}
print("ready", flush=True)
sys.stdin.read()
"""


def memory_of_a_run(version: int, layers: int, path: Path) -> None:
    """The anonymous private memory of one run of the program, in order of address."""
    command = [sys.executable, "-c", _APP.format(version=version, layers=layers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as app:
        assert app.stdout is not None
        app.stdout.readline()
        with open(f"/proc/{app.pid}/mem", "rb", 0) as memory, path.open("wb") as out:  # noqa: PTH123
            for line in Path(f"/proc/{app.pid}/maps").read_text().splitlines():
                where, rights, _, _, inode, *_ = line.split()
                if rights.startswith("rw") and inode == "0":
                    start, end = (int(part, 16) for part in where.split("-"))
                    memory.seek(start)
                    while start < end and (piece := memory.read(min(end - start, 1 << 22))):
                        out.write(piece)
                        start += len(piece)
        app.communicate()


def measure_chunks(scratch: Path) -> None:
    files = [scratch / "one", scratch / "two"]
    for version, file in enumerate(files):
        memory_of_a_run(version, 24, file)
    default = (chunks.MIN_PAGES, chunks._MEAN, chunks.MAX_PAGES)
    for sizes in ((1, 8, 64), (16, 64, 512), (64, 128, 1024), (64, 256, 1024), default, (256, 512, 2048)):
        chunks.MIN_PAGES, chunks._MEAN, chunks.MAX_PAGES = sizes
        stored: dict[bytes, int] = {}
        added, count, pages_in = [], 0, 0
        for file in files:
            new = 0
            with file.open("rb") as source:
                for pages in chunks.Splitter(source, 0x9E3779B97F4A7C15):
                    count, pages_in = count + 1, pages_in + len(pages)
                    if (key := blake3(pages).digest()) not in stored:
                        stored[key] = len(zstd.compress(pages, 1))
                        new += stored[key]
            added.append(new)
        row = {
            "min_pages": sizes[0],
            "mean_pages": sizes[1],
            "max_pages": sizes[2],
            "mean_kib": pages_in // count // 1024,
        }
        print(json.dumps(row | {"second_adds_percent": round(100 * added[1] / added[0], 1)}), flush=True)
    chunks.MIN_PAGES, chunks._MEAN, chunks.MAX_PAGES = default


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="relume-bench-") as scratch:
        measure_chunks(Path(scratch))


if __name__ == "__main__":
    main()
