"""Parts for the store's tests: a region in a directory, two nodes of it, and a checkpoint as CRIU would leave it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relume.store import BuildRecord, LocalCheckpoint, Patience, Region, RegionConfig, faults, new_key_file
from relume.store.chunks import PAGE

IMPATIENT = Patience(bound_s=2.0, request_s=2.0, first_wait_s=0.01, longest_wait_s=0.05)


def some_pages(seed: int, count: int, *, zero_every: int = 0) -> bytes:
    """`count` pages of noise that compresses about in half; every `zero_every`-th is zero."""
    rng = random.Random(seed)
    return b"".join(
        bytes(PAGE)
        if zero_every and page % zero_every == 0
        else rng.randbytes(PAGE // 2) + bytes(PAGE // 2 - 8) + b"\1" * 8
        for page in range(count)
    )


def write_checkpoint(
    root: Path, *, seed: int = 1, pages: int = 700, build: str = "build-1"
) -> LocalCheckpoint:
    """Two page images, small images, a held tree and a companion, as the checkpoint room leaves them."""
    images, held = root / "images", root / "held"
    images.mkdir(parents=True)
    (held / "tmp").mkdir(parents=True)
    (images / "pages-1.img").write_bytes(some_pages(seed, pages, zero_every=7))
    (images / "pages-2.img").write_bytes(some_pages(seed + 1000, 40))
    (images / "pagemap-1.img").write_bytes(b"pagemap")
    (images / "inventory.img").write_bytes(b"inventory" * 100)
    (held / "tmp" / "open-file").write_text("held")
    (root / "checkpoint.json").write_text("{}")
    return LocalCheckpoint(
        app="an-app",
        build=build,
        platform="x86-1",
        images=images,
        files=held,
        companions=[root / "checkpoint.json"],
        facts={"processes": 2},
        layers=["a" * 64],
    )


@pytest.fixture
def node(tmp_path: Path) -> Callable[..., Region]:
    """`node("a")`: a node of one region, with a state of its own, over one directory as store."""
    key = tmp_path / "region.key"
    new_key_file(key)

    def make(name: str, *, key_file: Path | None = key, **config: object) -> Region:
        settings = {"lease_s": 10.0, "grace_s": 0.0, "patience": IMPATIENT} | config
        url = f"file://{tmp_path}/store"
        return Region(RegionConfig(url=url, key_file=key_file, **settings), tmp_path / name, name)  # type: ignore[arg-type]

    return make


@pytest.fixture
def checkpoint(tmp_path: Path) -> LocalCheckpoint:
    return write_checkpoint(tmp_path / "local")


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.install(None)


def publish_build(
    region: Region, app: str, inputs: str, digest: str, layer: Path, facts: dict[str, Any] | None = None
) -> BuildRecord:
    """A build of one layer, whose file is `layer`."""

    def pack(_: str, file: Path) -> None:
        shutil.copyfile(layer, file)

    with region.build_lease(inputs).kept() as lease:
        return region.publish_build(lease, app, inputs, facts or {}, [digest], pack)
