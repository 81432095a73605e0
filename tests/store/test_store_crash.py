"""The crash matrix: `kill -9` at every named fault point, then everything visible is whole and a retry completes.

A child process does the store's whole life on one node (publish, working set, layers, fetch and fill, evict, remove,
collect) and kills itself at the point. The next child is the node after its restart.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.store import Region, RegionConfig, faults, new_key_file
from store_servers import PASSWORD, USER, localbucket, url

PAGE = 4096

LIFE = """
import os, signal, sys, time
from pathlib import Path
from relume.store import *
from relume.store import faults

url, root, point, nth = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
hits = 0

def hook(name):
    global hits
    hits += name == point
    if name == point and hits == nth:
        os.kill(os.getpid(), signal.SIGKILL)

config = RegionConfig(url, root / "region.key", grace_s=0.0, limits=Limits(parallel=2))
region = Region(config, root / "node", "node")
region.sweep()
faults.install(hook)

def publish(build, images):
    source = LocalCheckpoint("app", build, "platform", root / images, root / "held")
    if (found := region.find(build, "platform")) is not None:
        return found
    with region.lease("app", build, "platform").kept() as lease:
        return region.publish(lease, source)

def learn(manifest, images):
    runs = [PageRun("pages-1.img", 1, 2500)]
    region.publish_working_set(manifest, runs, read_from_files(root / images))

def pack(digest, file):
    file.write_bytes((root / "layer").read_bytes())

if region.find_build("app", "inputs") is None:
    with region.build_lease("inputs").kept() as lease:
        region.publish_build(lease, "app", "inputs", {}, ["d" * 64], pack)
kept = publish("kept", "images-1")
learn(kept, "images-1")
doomed = publish("doomed", "images-2")
learn(doomed, "images-2")
for manifest in (kept, doomed):
    region.pull(manifest.name)
region.cache.evict(kept.name.id)
region.pull(kept.name)
region.remove(doomed.name)
time.sleep(1.1)  # the server's time stamps are whole seconds
region.collect(dry_run=False)
region.collect(dry_run=False)
print("lived", hits)
"""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    with localbucket(tmp_path) as endpoint:
        yield endpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_key_file(tmp_path / "region.key")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "file").write_text("held")
    rng = random.Random(11)
    shared = rng.randbytes(1500 * PAGE)
    for images in ("images-1", "images-2"):
        (tmp_path / images).mkdir()
        (tmp_path / images / "inventory.img").write_bytes(b"inventory")
        (tmp_path / images / "pages-1.img").write_bytes(shared + rng.randbytes(1100 * PAGE))
    (tmp_path / "layer").write_bytes(rng.randbytes(2_000_000))
    return tmp_path


def live(endpoint: str, root: Path, point: str = "", nth: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIFE, url(endpoint), str(root), point, str(nth)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ,
    )


@pytest.mark.parametrize("point", faults.POINTS)
def test_killed_at(bucket: str, root: Path, point: str) -> None:
    nth = 2 if point in ("publish.chunk", "fetch.chunk", "gc.object", "gc.chunk") else 1
    killed = live(bucket, root, point, nth)
    assert killed.returncode == -signal.SIGKILL, f"{point} was not reached: {killed.stdout}{killed.stderr}"
    observer = Region(
        RegionConfig(url(bucket), root / "region.key", grace_s=0.0), root / "observer", "observer"
    )
    for name in observer.names():
        assert observer.verify(name).problems == ()
    retried = live(bucket, root)
    assert retried.returncode == 0, retried.stderr
    (name,) = observer.names()
    assert name.build == "kept"
    assert observer.verify(name).problems == ()
    observer.pull(name)
    fetched = observer.fetch(name)
    assert (fetched.images / "pages-1.img").read_bytes() == (root / "images-1" / "pages-1.img").read_bytes()
    fetched.close()
    observer.fetch_layer("d" * 64, root / "layer-copy")
    assert (root / "layer-copy").read_bytes() == (root / "layer").read_bytes()
    cache = root / "node" / "cache"
    assert not list(cache.glob(".*")), "nothing half made is left in the cache"
    assert not list((root / "node" / "scratch").iterdir())
