"""Garbage collection: everything that is nobody's goes, nothing that may become somebody's does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relume.errors import Conflict, ObjectMissing, Superseded, Untrusted
from relume.store import CheckpointName, LocalCheckpoint, PageRun, Region, faults, read_from_files

from .conftest import publish_build, write_checkpoint

Nodes = Callable[..., Region]


def published(region: Region, source: LocalCheckpoint) -> CheckpointName:
    with region.lease(source.app, source.build, source.platform).kept() as lease:
        return region.publish(lease, source).name


def objects(tmp_path: Path, kind: str) -> int:
    return sum(path.is_file() for path in (tmp_path / "store" / kind).rglob("*"))


def test_what_is_used_stays(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a = node("a")
    name = published(a, checkpoint)
    time.sleep(0.02)
    report = a.collect(dry_run=False)
    assert (report.objects, report.checkpoints, report.busy) == (0, [], [])
    assert a.verify(name).clean


def test_a_removed_checkpoint_goes_after_the_grace_period(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    patient = node("a", grace_s=3600.0)
    manifest = patient.manifest(published(patient, checkpoint))
    patient.publish_working_set(
        manifest, [PageRun("pages-1.img", 1, 100)], read_from_files(checkpoint.images)
    )
    reader = node("reader").fetch(manifest.name)
    patient.remove(manifest.name)
    assert patient.names() == []
    assert node("b").find("build-1", "x86-1") is None
    assert patient.collect(dry_run=False).objects == 0
    reader.pages.fill()  # a reader of before can still read on
    reader.close()
    hasty = node("hasty")
    time.sleep(0.02)
    dry = hasty.collect(dry_run=True)
    assert dry.checkpoints == [manifest.name.id]
    assert objects(tmp_path, "checkpoint") == 4
    wet = hasty.collect(dry_run=False)
    assert wet.checkpoints == [manifest.name.id]
    hasty.collect(dry_run=False)
    assert [objects(tmp_path, kind) for kind in ("checkpoint", "chunk", "working-set")] == [0, 0, 0]
    assert dry.bytes == wet.bytes


def test_chunks_that_another_build_uses_stay(node: Nodes, tmp_path: Path) -> None:
    a = node("a")
    first = published(a, write_checkpoint(tmp_path / "one"))
    second = published(a, write_checkpoint(tmp_path / "two", build="build-2"))
    a.remove(first)
    time.sleep(0.02)
    a.collect(dry_run=False)
    assert a.verify(second).clean


def test_removing_takes_the_older_generations_along(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a = node("a")
    published(a, checkpoint)
    a.remove(published(a, checkpoint))
    assert a.names() == []
    assert node("b").find("build-1", "x86-1") is None
    assert published(a, checkpoint).generation == 3


def test_an_upload_that_goes_on_keeps_its_tenants_chunks(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    """The race: the collector runs when all chunks are there and no manifest names them."""
    a, b = node("a"), node("b")
    reports = []

    def hook(point: str) -> None:
        if point == "publish.images":
            faults.install(None)
            reports.append(b.collect(dry_run=False))

    faults.install(hook)
    name = published(a, checkpoint)
    assert reports[0].chunks == 0
    assert reports[0].busy
    assert a.verify(name).clean


def test_an_uploader_waits_for_a_sweep_that_goes_on(node: Nodes, tmp_path: Path) -> None:
    """The other order: an upload begins while the collector deletes what it would find present."""
    a, b = node("a"), node("b")
    doomed = write_checkpoint(tmp_path / "one")
    a.remove(published(a, doomed))
    time.sleep(0.02)
    again = write_checkpoint(tmp_path / "two", build="build-2")  # the same pages
    names: list[CheckpointName] = []
    uploader = threading.Thread(target=lambda: names.append(published(a, again)))
    deleted_before_upload_ended = []

    def hook(point: str) -> None:
        if point == "gc.chunk" and not deleted_before_upload_ended:
            uploader.start()
            time.sleep(0.3)
            deleted_before_upload_ended.append(not names)

    faults.install(hook)
    b.collect(dry_run=False)
    uploader.join()
    assert deleted_before_upload_ended == [True]
    assert a.verify(names[0]).clean


def test_a_dead_upload_is_closed_and_its_chunks_go(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a, b = node("a", lease_s=2.0), node("b", lease_s=2.0)
    lease = a.lease("an-app", "build-1", "x86-1")

    class Killed(Exception):
        pass

    def kill(point: str) -> None:
        if point == "publish.images":
            raise Killed

    faults.install(kill)
    with pytest.raises(Killed):
        a.publish(lease, checkpoint)
    faults.install(None)
    assert b.collect(dry_run=False).busy  # just seen: alive for all it knows
    time.sleep(2.2)
    b.collect(dry_run=False)
    time.sleep(0.05)
    b.collect(dry_run=False)
    assert objects(tmp_path, "chunk") == 0
    with pytest.raises(Superseded):
        a.publish(lease, checkpoint)  # it wakes up, and cannot publish over what was collected
    assert b.names() == []
    assert b.verify(published(b, checkpoint)).clean


def test_a_manifest_that_cannot_be_read_stops_the_collection(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a = node("a")
    name = published(a, checkpoint)
    before = objects(tmp_path, "chunk")
    path = tmp_path / "store" / name.manifest
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    time.sleep(0.02)
    with pytest.raises(Untrusted):
        a.collect(dry_run=False)
    assert objects(tmp_path, "chunk") == before


def test_one_collection_at_a_time(node: Nodes) -> None:
    a, b = node("a"), node("b")
    with a.leases.acquire("sweep").kept(), pytest.raises(Conflict):
        b.collect()


def test_layers_keep_their_chunks(node: Nodes, tmp_path: Path) -> None:
    a = node("a")
    layer = tmp_path / "layer"
    layer.write_bytes(b"layer" * 10_000)
    publish_build(a, "x", "i", "d" * 64, layer)
    time.sleep(0.02)
    assert a.collect(dry_run=False).objects == 0
    a.fetch_layer("d" * 64, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == layer.read_bytes()
    assert a.remove_builds("x") == 1
    time.sleep(0.02)
    a.collect(dry_run=False)
    a.collect(dry_run=False)
    assert [objects(tmp_path, kind) for kind in ("layer", "chunk", "build")] == [0, 0, 0]


def test_a_build_that_was_made_anew_replaces_the_one_before(node: Nodes, tmp_path: Path) -> None:
    a = node("a")
    layers = {digit: tmp_path / digit for digit in "de"}
    for digit, layer in layers.items():
        layer.write_bytes(digit.encode() * 70_000)
        publish_build(a, "x", "i", digit * 64, layer)
        time.sleep(0.02)
    assert [build.number for build in a.builds("x")] == [1, 2]
    seen = a.collect()
    assert a.collect(dry_run=False).objects == seen.objects
    a.collect(dry_run=False)
    assert [build.number for build in a.builds("x")] == [2]
    a.fetch_layer("e" * 64, tmp_path / "copy")
    with pytest.raises(ObjectMissing):
        a.fetch_layer("d" * 64, tmp_path / "none")


def test_layers_that_a_checkpoint_needs_stay(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a = node("a")
    layer = tmp_path / "layer"
    layer.write_bytes(b"layer" * 10_000)
    publish_build(a, "x", "i", checkpoint.layers[0], layer)
    published(a, checkpoint)
    assert a.remove_builds("x") == 1
    time.sleep(0.02)
    a.collect(dry_run=False)
    a.fetch_layer(checkpoint.layers[0], tmp_path / "copy")


def test_old_leases_and_working_sets_go(node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path) -> None:
    a = node("a")
    for _ in range(3):
        manifest = a.manifest(published(a, checkpoint))
    for _ in range(2):
        a.publish_working_set(manifest, [PageRun("pages-1.img", 1, 100)], read_from_files(checkpoint.images))
    assert objects(tmp_path, "lease") == 6
    assert objects(tmp_path, "working-set") == 4
    time.sleep(0.02)
    a.collect(dry_run=False)
    assert sorted(path.name for path in (tmp_path / "store" / manifest.name.lease).iterdir()) == [
        "1",
        "2",
        "3",
    ]
    assert objects(tmp_path, "lease") == 2
    assert objects(tmp_path, "working-set") == 2
    assert a.lease("an-app", "build-1", "x86-1").number == 4
    assert a.verify(manifest.name).clean


def test_retention_by_count_and_age(node: Nodes, tmp_path: Path) -> None:
    a = node("a")
    names = [
        published(a, write_checkpoint(tmp_path / f"c{at}", build=f"build-{at}", pages=70)) for at in range(4)
    ]
    assert a.retain("another-app", keep=0) == []
    assert set(a.retain("an-app", keep=2)) == set(names[:2])
    assert a.names() == names[2:]
    assert a.retain("an-app", keep=2, max_age_s=3600.0) == []
    assert a.retain("an-app", keep=2, max_age_s=0.0) == names[:1:-1]
    assert a.remove_app("an-app") == []
