"""Upload and download of one checkpoint, beside a plain obstore copy of the same files with the same server.

The plain copy does nothing but move bytes: one object with obstore's own parallel requests, or 4 MiB objects with as
many requests in flight as relume has, whichever is faster. relume cuts, hashes, compresses and encrypts on the way
up, and decrypts, unpacks, hashes, writes and syncs on the way down; the plain download writes and syncs as well.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

from relume.cli.benchmark.bucket import Bucket
from relume.store import Limits, LocalCheckpoint, Region, RegionConfig

PARALLEL = 8

_PIECE = 4 << 20


@dataclass(slots=True)
class Transfers:
    """Seconds of every run, by what was done."""

    plain_bytes: int
    stored_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def timed(self, what: str, work: Callable[[], object]) -> None:
        os.sync()  # what the way before has left to be written must not be this one's burden
        began = time.monotonic()
        work()
        self.seconds.setdefault(what, []).append(time.monotonic() - began)

    def rows(self, workload: str) -> list[dict[str, Any]]:
        """Two rows: upload and download, with ``speed_ratio`` to the faster plain way (above 1: sooner than it)."""
        found = []
        for what, ways in (("upload", _PUTS), ("download", _GETS)):
            took = {way: statistics.median(self.seconds[way]) for way in ways}
            plain = min(took, key=lambda way: took[way])
            seconds = statistics.median(self.seconds[what])
            found.append(
                {
                    "row": what,
                    "workload": workload,
                    "seconds": round(seconds, 3),
                    "spread": [round(choose(self.seconds[what]), 3) for choose in (min, max)],
                    "plain_s": round(took[plain], 3),
                    "plain_way": plain,
                    "speed_ratio": round(took[plain] / seconds, 2),
                    "plain_bytes": self.plain_bytes,
                    "stored_bytes": self.stored_bytes,
                    "parallel": PARALLEL,
                    "runs": len(self.seconds[what]),
                }
            )
        return found


def measure(
    bucket: Bucket, key: Path, images: Path, scratch: Path, runs: int, say: Callable[[str], None]
) -> Transfers:
    """``runs`` times each way, interleaved. ``images`` is a folder of files; ``scratch`` is on the same disk."""
    files = sorted(path for path in images.iterdir() if path.is_file())
    found = Transfers(sum(path.stat().st_size for path in files))
    store = S3Store(
        "bucket",
        endpoint=bucket.endpoint,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "120s"},
    )
    for run in range(runs):
        say(f"upload and download: round {run + 1} of {runs}")
        for way, put in _PUTS.items():
            found.timed(way, partial(put, store, files))
        region = Region(
            RegionConfig(bucket.url(f"transfer-{run}"), key, limits=Limits(PARALLEL)),
            scratch / "node",
            "bench",
        )
        with region.lease("bench", "build", "platform").kept() as lease:
            source = LocalCheckpoint("bench", "build", "platform", images)
            found.timed("upload", partial(region.publish, lease, source))
        (name,) = region.names()
        found.stored_bytes = region.manifest(name).sizes.stored
        for way, get in _GETS.items():
            copy = scratch / "plain"
            copy.mkdir()
            found.timed(way, partial(get, store, files, copy))
            shutil.rmtree(copy)
        found.timed("download", partial(region.pull, name))
        shutil.rmtree(scratch / "node")
        for prefix in (f"transfer-{run}", "plain"):
            shutil.rmtree(bucket.objects / prefix)
    return found


# --- the plain ways -------------------------------------------------------------------------------


def _put_objects(store: S3Store, files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            obstore.put(store, f"plain/one/{path.name}", file, max_concurrency=PARALLEL)


def _get_objects(store: S3Store, files: list[Path], directory: Path) -> None:
    for path in files:
        with (directory / path.name).open("wb") as out:
            for block in obstore.get(store, f"plain/one/{path.name}").stream(min_chunk_size=_PIECE):
                out.write(block)
            os.fsync(out.fileno())


def _put_pieces(store: S3Store, files: list[Path]) -> None:
    def put(piece: tuple[Path, int]) -> None:
        path, at = piece
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            obstore.put(store, f"plain/many/{path.name}/{at}", file.read(_PIECE), use_multipart=False)

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(put, _pieces(files)))


def _get_pieces(store: S3Store, files: list[Path], directory: Path) -> None:
    def get(piece: tuple[Path, int]) -> None:
        path, at = piece
        data = obstore.get(store, f"plain/many/{path.name}/{at}").bytes()
        descriptor = os.open(directory / path.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(descriptor, data, at)
        os.close(descriptor)

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(get, _pieces(files)))
    for path in files:
        descriptor = os.open(directory / path.name, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(descriptor)
        os.close(descriptor)


def _pieces(files: list[Path]) -> Iterator[tuple[Path, int]]:
    for path in files:
        for at in range(0, path.stat().st_size or 1, _PIECE):
            yield path, at


_PUTS = {"one put for each file": _put_objects, "puts of 4 MiB": _put_pieces}
_GETS = {"one get for each file": _get_objects, "gets of 4 MiB": _get_pieces}
