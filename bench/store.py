#!/usr/bin/env python3
"""Measures the store room: `bench/store.py chunks` and `bench/store.py speed`. One JSON row per line on stdout.

`chunks`: the memory of two runs of a model-like program, changed by one line, cut with several chunk sizes: how
many objects, and how much the second run adds to what the first has stored.

`speed`: upload and download of such memory through a real S3 server on loopback (localbucket), beside a plain
obstore copy of the same bytes with the same server, interleaved. Trust the ratios, not the MB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import obstore
from blake3 import blake3
from obstore.store import S3Store

from relume.store import CheckpointName, Limits, LocalCheckpoint, Region, RegionConfig, chunks, new_key_file
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
    for sizes in ((1, 8, 64), (16, 64, 512), (64, 128, 1024), default, (256, 512, 2048)):
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


@contextmanager
def s3_server(scratch: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (scratch / "data" / "bucket").mkdir(parents=True)
    program = Path(sys.executable).with_name("localbucket")
    server = subprocess.Popen(
        [program, "--port", str(port), scratch / "data"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure_speed(scratch: Path, runs: int, parallel: int) -> None:
    images = scratch / "images"
    images.mkdir()
    memory_of_a_run(1, 48, images / "pages-1.img")
    plain_bytes = (images / "pages-1.img").stat().st_size
    new_key_file(scratch / "key")
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
    with s3_server(scratch) as endpoint:
        plain = S3Store(
            "bucket",
            endpoint=endpoint,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        times: dict[str, list[float]] = {"plain put": [], "publish": [], "plain get": [], "fetch": []}
        for run in range(runs):
            with (images / "pages-1.img").open("rb") as file:
                times["plain put"].append(
                    timed(lambda file=file: obstore.put(plain, "plain", file, max_concurrency=parallel))
                )
            config = RegionConfig(
                f"s3://bucket/{run}?endpoint={endpoint}&path_style=true",
                scratch / "key",
                limits=Limits(parallel),
            )
            region = Region(config, scratch / f"node-{run}", "bench")
            source = LocalCheckpoint("app", "build", "platform", images)
            with region.lease("app", "build", "platform").kept() as lease:
                times["publish"].append(timed(partial(region.publish, lease, source)))
            copy = scratch / f"copy-{run}"

            def plain_get(copy: Path = copy) -> None:
                with copy.open("wb") as out:
                    for block in obstore.get(plain, "plain").stream(min_chunk_size=4 << 20):
                        out.write(block)
                    os.fsync(out.fileno())

            times["plain get"].append(timed(plain_get))
            (name,) = region.names()

            def fetch(region: Region = region, name: CheckpointName = name) -> None:
                fetched = region.fetch(name)
                region.fill(fetched, parallel)
                fetched.close()

            times["fetch"].append(timed(fetch))
            copy.unlink()
            shutil.rmtree(region.cache.root)
            stored = region.manifest(name).sizes.stored
    for ours, theirs in (("publish", "plain put"), ("fetch", "plain get")):
        mine, other = statistics.median(times[ours]), statistics.median(times[theirs])
        print(
            json.dumps(
                {
                    "what": ours,
                    "beside": theirs,
                    "speed_ratio": round(other / mine, 2),
                    "seconds": round(mine, 2),
                    "plain_seconds": round(other, 2),
                    "bytes": plain_bytes,
                    "stored_bytes": stored,
                    "parallel": parallel,
                    "runs": runs,
                }
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["chunks", "speed"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relume-bench-") as scratch:
        if arguments.what == "chunks":
            measure_chunks(Path(scratch))
        else:
            measure_speed(Path(scratch), arguments.runs, arguments.parallel)


if __name__ == "__main__":
    main()
