"""The store against real servers: the whole way, misbehaving networks, and eight nodes at once."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relume.errors import StoreError, Untrusted
from relume.store import (
    CheckpointName,
    Limits,
    LocalCheckpoint,
    Manifest,
    PageRun,
    Patience,
    Region,
    RegionConfig,
    new_key_file,
    read_from_files,
)
from store_servers import PASSWORD, USER, FaultProxy, juicefs_gateway, localbucket, moto, url

PAGE = 4096
Nodes = Callable[..., Region]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", USER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def node(tmp_path: Path) -> Nodes:
    """`node("b", url)`: a node of the region, with a state of its own."""
    key = tmp_path / "region.key"
    new_key_file(key)

    def make(
        name: str, store: str, *, bound_s: float = 30.0, lease_s: float = 10.0, keyed: bool = True
    ) -> Region:
        patience = Patience(bound_s=bound_s, request_s=10.0, first_wait_s=0.02, longest_wait_s=0.5)
        config = RegionConfig(
            store,
            key if keyed else None,
            patience=patience,
            lease_s=lease_s,
            grace_s=0.0,
            limits=Limits(parallel=4),
        )
        return Region(config, tmp_path / "nodes" / name, name)

    return make


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    with localbucket(tmp_path) as endpoint:
        yield endpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> LocalCheckpoint:
    return write_checkpoint(tmp_path / "local")


def write_checkpoint(root: Path, *, mib: int = 12) -> LocalCheckpoint:
    images, held = root / "images", root / "held"
    images.mkdir(parents=True)
    held.mkdir()
    rng = random.Random(7)
    with (images / "pages-1.img").open("wb") as file:
        for page in range(mib * 256):
            file.write(bytes(PAGE) if page % 9 == 0 else rng.randbytes(PAGE // 2) + b"w" * (PAGE // 2))
    (images / "inventory.img").write_bytes(b"inventory")
    (held / "log").write_text("held")
    return LocalCheckpoint("app", "build", "platform", images, held)


def publish(region: Region, source: LocalCheckpoint) -> Manifest:
    with region.lease(source.app, source.build, source.platform).kept() as lease:
        return region.publish(lease, source)


def assert_same(region: Region, name: CheckpointName, source: LocalCheckpoint) -> None:
    region.pull(name)
    fetched = region.fetch(name)
    assert fetched.complete
    assert (fetched.images / "pages-1.img").read_bytes() == (source.images / "pages-1.img").read_bytes()
    assert fetched.held is not None
    assert (fetched.held / "log").read_text() == "held"
    fetched.close()


@pytest.mark.parametrize("server", [localbucket, moto])
def test_the_whole_way(
    server: Callable[..., Iterator[str]], tmp_path: Path, node: Nodes, checkpoint: LocalCheckpoint
) -> None:
    with server(tmp_path) as endpoint:  # type: ignore[attr-defined]
        a, b = node("a", url(endpoint)), node("b", url(endpoint))
        a.prove()
        manifest = publish(a, checkpoint)
        found = b.find("build", "platform")
        assert found == manifest
        assert_same(b, manifest.name, checkpoint)
        assert b.verify(manifest.name).clean
        with pytest.raises(Untrusted):
            node("stranger", url(endpoint), keyed=False).find("build", "platform")
        a.remove(manifest.name)
        assert b.find("build", "platform") is None
        time.sleep(1.1)  # the servers' time stamps are whole seconds
        assert a.collect(dry_run=False).chunks > 0
        assert a.objects.list("chunk") == []


def test_a_store_that_overwrites_is_refused(tmp_path: Path, node: Nodes) -> None:
    with (
        juicefs_gateway(tmp_path) as endpoint,
        pytest.raises(StoreError, match="ignores create-if-absent") as refusal,
    ):
        node("a", url(endpoint, bucket="jfs")).prove()
    assert "Use a store that honours conditional writes" in refusal.value.hint


@pytest.mark.parametrize(
    "fault", ["latency", "500", "503", "reset", "reset-request", "truncate", "slow", "lost-answer"]
)
def test_passing_trouble_is_survived(
    bucket: str, node: Nodes, checkpoint: LocalCheckpoint, fault: str
) -> None:
    with FaultProxy(bucket) as proxy:
        a, b = node("a", url(proxy.endpoint)), node("b", url(proxy.endpoint))
        proxy.fault = fault
        name = publish(a, checkpoint).name
        assert name.generation == 1
        assert_same(b, name, checkpoint)
        assert proxy.hits >= 5
        if fault not in ("latency", "slow"):
            assert a.counters.retries + b.counters.retries >= 5
        proxy.fault = ""
        assert node("c", url(bucket)).verify(name).clean


def test_a_store_that_is_gone_for_a_while(bucket: str, node: Nodes, checkpoint: LocalCheckpoint) -> None:
    with FaultProxy(bucket) as proxy:
        a = node("a", url(proxy.endpoint))
        proxy.fault = "outage"
        back = threading.Timer(3.0, lambda: setattr(proxy, "fault", ""))
        back.start()
        assert publish(a, checkpoint).generation == 1
        back.join()
        assert a.counters.retries > 3


def test_a_store_that_stays_away(bucket: str, node: Nodes, checkpoint: LocalCheckpoint) -> None:
    """A clear error within the bound, nothing half visible, and the next attempt sends only what is missing."""
    with FaultProxy(bucket) as proxy:
        a, b = node("a", url(proxy.endpoint), bound_s=1.5), node("b", url(bucket))
        with a.lease("app", "build", "platform").kept() as lease:
            sent = 0

            def outage_after_some(method: str, path: str) -> str:
                nonlocal sent
                sent += method == "PUT" and "/chunk/" in path
                return "outage" if sent > 4 else ""

            proxy.next_fault = outage_after_some  # type: ignore[method-assign]
            begin = time.monotonic()
            with pytest.raises(StoreError, match=r"did not .* within"):
                a.publish(lease, checkpoint)
            assert time.monotonic() - begin < 10
            assert b.find("build", "platform") is None
            del proxy.next_fault  # type: ignore[method-assign]
            before = len(b.objects.list("chunk"))
            assert 0 < before <= 5
            manifest = a.publish(lease, checkpoint)
        assert manifest.sizes.new_stored < manifest.sizes.stored
        assert_same(b, manifest.name, checkpoint)


def test_a_node_without_its_store_gets_a_clear_error(
    node: Nodes, checkpoint: LocalCheckpoint, bucket: str
) -> None:
    with FaultProxy(bucket) as proxy:
        b = node("b", url(proxy.endpoint), bound_s=1.0)
        name = publish(node("a", url(bucket)), checkpoint).name
        fetched = b.fetch(name)
        proxy.fault = "outage"
        with pytest.raises(StoreError, match="did not list"):
            b.find("build", "platform")
        with pytest.raises(StoreError, match="did not get"):
            fetched.pages.ensure("pages-1.img", 1, 1)
        proxy.fault = ""
        fetched.pages.ensure("pages-1.img", 1, 1)
        fetched.close()


def test_the_bytes_before_the_first_answer(bucket: str, node: Nodes, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "large", mib=60)
    a, b = node("a", url(bucket)), node("b", url(bucket))
    manifest = publish(a, source)
    touched = [
        PageRun("pages-1.img", first * 9 + 1, 8) for first in random.Random(3).sample(range(1700), 500)
    ]
    a.publish_working_set(manifest, touched, read_from_files(source.images))
    assert b.find("build", "platform") is not None
    fetched = b.fetch(manifest.name)
    assert fetched.pages.working_set is not None
    fetched.pages.prefetch()
    for run in touched:
        fetched.pages.ensure(run.stream, run.first, run.pages)
    assert b.counters.bytes_read <= 1.3 * fetched.pages.working_set.stored_bytes
    assert b.counters.requests <= 20
    fetched.close()


@pytest.mark.parametrize("kind", ["chunk", "index", "images", "manifest", "part", "list"])
def test_one_flipped_bit(
    bucket: str, node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path, kind: str
) -> None:
    """A bad object is a refusal with its name in it; a bad working set is left aside, and every page is right."""
    a, b = node("a", url(bucket)), node("b", url(bucket))
    manifest = publish(a, checkpoint)
    if kind in ("part", "list"):
        a.publish_working_set(manifest, [PageRun("pages-1.img", 1, 2000)], read_from_files(checkpoint.images))
    name = manifest.name
    victim = {
        "chunk": a.objects.list("chunk")[0].name,
        "index": name.index,
        "images": name.images,
        "manifest": name.manifest,
        "part": f"{name.working_sets}/1/0",
        "list": f"{name.working_sets}/1/list",
    }[kind]
    data = bytearray(a.objects.get(victim, limit=1 << 24))
    data[len(data) // 2] ^= 4
    a.objects.put(victim, bytes(data))
    verdict = b.verify(name)
    assert not verdict.clean
    assert victim in verdict.problems[0]
    if kind in ("part", "list"):
        assert_same(b, name, checkpoint)
        return
    with pytest.raises(Untrusted, match=victim):
        b.find("build", "platform")
        b.pull(name)
    assert all(not entry.complete for entry in b.cache.entries())


NODE = """
import sys
from pathlib import Path
from relume.errors import Conflict
from relume.store import *
url, key, state, images, out = sys.argv[1:]
region = Region(RegionConfig(url, Path(key), lease_s=20.0), Path(state), Path(state).name)
sys.stdin.readline()
source = LocalCheckpoint("app", "build", "platform", Path(images))
try:
    with region.lease("app", "build", "platform").kept() as lease:
        if region.find("build", "platform") is None:
            region.publish(lease, source)
            print("published")
except Conflict as conflict:
    print(conflict.details.get("reason"))
import time
while (manifest := region.find("build", "platform")) is None:
    time.sleep(0.05)
region.pull(manifest.name)
fetched = region.fetch(manifest.name)
Path(out).write_bytes((fetched.images / "pages-1.img").read_bytes())
"""


def test_eight_nodes_at_once_make_one_checkpoint(
    bucket: str, tmp_path: Path, checkpoint: LocalCheckpoint, node: Nodes
) -> None:
    nodes = []
    for at in range(8):
        arguments = [
            url(bucket),
            tmp_path / "region.key",
            tmp_path / "nodes" / f"n{at}",
            checkpoint.images,
            tmp_path / f"out-{at}",
        ]
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-c", NODE, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for each in nodes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    said = [each.communicate(timeout=120)[0].strip() for each in nodes]
    assert [each.returncode for each in nodes] == [0] * 8
    assert said.count("published") == 1
    assert set(said) <= {"published", "in_progress", ""}
    expected = (checkpoint.images / "pages-1.img").read_bytes()
    assert all((tmp_path / f"out-{at}").read_bytes() == expected for at in range(8))
    assert len(node("watcher", url(bucket)).names()) == 1


PUBLISH = """
import resource, sys
from pathlib import Path
from relume.store import *
url, key, state, images = sys.argv[1:]
region = Region(RegionConfig(url, Path(key), limits=Limits(parallel=4)), Path(state), "node")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with region.lease("app", "build", "platform").kept() as lease:
    name = region.publish(lease, LocalCheckpoint("app", "build", "platform", Path(images))).name
published = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
region.pull(name)
print(published - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(bucket: str, tmp_path: Path, node: Nodes) -> None:
    """Upload and download hold some chunks for each request in flight, whatever the checkpoint's size."""
    images = tmp_path / "images"
    images.mkdir()
    noise = random.Random(1).randbytes(1 << 24)
    with (images / "pages-1.img").open("wb") as file:
        for at in range(30):
            file.write(noise[at * PAGE :] + noise[: at * PAGE])
    arguments = [url(bucket), tmp_path / "region.key", tmp_path / "nodes" / "n", images]
    output = subprocess.run(
        [sys.executable, "-c", PUBLISH, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout
    upload_kib, both_kib = map(int, output.split())
    assert upload_kib < 160 * 1024
    assert both_kib < 250 * 1024
