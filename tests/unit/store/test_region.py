"""The whole way, over a directory: publish on one node, start on another, remove, collect."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from relume.errors import Conflict, ObjectMissing, StoreError, Superseded, Untrusted
from relume.store import CheckpointName, LocalCheckpoint, PageRun, Progress, Region, faults, read_from_files
from relume.store.chunks import PAGE

from .conftest import publish_build, write_checkpoint

Nodes = Callable[..., Region]


def published(region: Region, source: LocalCheckpoint) -> CheckpointName:
    with region.lease(source.app, source.build, source.platform).kept() as lease:
        return region.publish(lease, source).name


def same_pages(directory: Path, source: LocalCheckpoint) -> bool:
    return all(
        (directory / name).read_bytes() == (source.images / name).read_bytes()
        for name in ("pages-1.img", "pages-2.img")
    )


def test_another_node_gets_the_same_bytes(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    published(node("a"), checkpoint)
    b = node("b")
    manifest = b.find("build-1", "x86-1")
    assert manifest is not None
    assert (manifest.app, manifest.node, manifest.facts, manifest.layers) == (
        "an-app",
        "a",
        {"processes": 2},
        ("a" * 64,),
    )
    fetched = b.fetch(manifest.name)
    assert not fetched.complete
    assert (fetched.images / "inventory.img").read_bytes() == b"inventory" * 100
    assert fetched.held is not None
    assert (fetched.held / "tmp" / "open-file").read_text() == "held"
    assert (fetched.directory / "checkpoint.json").read_text() == "{}"
    assert b.fill(fetched)
    assert same_pages(fetched.images, checkpoint)
    fetched.close()
    read = b.counters.bytes_read
    again = b.fetch(manifest.name)
    assert again.complete
    assert b.counters.bytes_read == read
    again.close()


def test_pages_come_on_demand_and_only_those(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    name = published(node("a"), checkpoint)
    b = node("b")
    fetched = b.fetch(name)
    before = b.counters.requests
    fetched.pages.ensure("pages-2.img", 3, 2)
    assert b.counters.requests == before + 1
    fetched.pages.ensure("pages-2.img", 3, 2)
    fetched.pages.ensure("pages-1.img", 7, 1)  # a zero page
    assert b.counters.requests == before + 1
    original = (checkpoint.images / "pages-2.img").read_bytes()
    with fetched.pages.path("pages-2.img").open("rb") as file:
        assert file.read(5 * PAGE)[3 * PAGE :] == original[3 * PAGE : 5 * PAGE]
    fetched.close()


def test_the_working_set_comes_in_few_requests(node: Nodes, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "large", pages=6000)
    a, b = node("a"), node("b")
    manifest = a.manifest(published(a, source))
    runs = [PageRun("pages-1.img", first, 6) for first in range(5993, 0, -70)] + [
        PageRun("pages-2.img", 0, 40)
    ]
    assert a.publish_working_set(manifest, runs, read_from_files(source.images)) == 1
    fetched = b.fetch(manifest.name)
    before, read = b.counters.requests, b.counters.bytes_read
    fetched.pages.prefetch()
    assert b.counters.requests == before + 1
    assert fetched.pages.working_set is not None
    assert b.counters.bytes_read - read == fetched.pages.working_set.stored_bytes
    for run in runs:
        fetched.pages.ensure(run.stream, run.first, run.pages)
    assert b.counters.requests == before + 1
    assert b.fill(fetched)
    assert same_pages(fetched.images, source)
    fetched.close()


def test_a_fault_in_the_working_set_asks_for_its_part_once(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a, b = node("a"), node("b")
    manifest = a.manifest(published(a, checkpoint))
    a.publish_working_set(manifest, [PageRun("pages-1.img", 1, 600)], read_from_files(checkpoint.images))
    fetched = b.fetch(manifest.name)
    before = b.counters.requests
    threads = [
        threading.Thread(target=fetched.pages.ensure, args=("pages-1.img", at, 10))
        for at in range(1, 500, 50)
    ]
    for thread in threads:
        thread.start()
    fetched.pages.prefetch()
    for thread in threads:
        thread.join()
    assert b.counters.requests == before + 1
    fetched.close()


def test_a_second_build_brings_only_what_changed(node: Nodes, tmp_path: Path) -> None:
    a = node("a")
    first = write_checkpoint(tmp_path / "one", pages=20000)
    second = write_checkpoint(tmp_path / "two", pages=20000, build="build-2")
    pages = (second.images / "pages-1.img").read_bytes()
    moved = b"\7" * PAGE * 3 + pages[: 10000 * PAGE] + b"\5" * PAGE + pages[10001 * PAGE :]
    (second.images / "pages-1.img").write_bytes(moved)
    whole = a.manifest(published(a, first)).sizes
    added = a.manifest(published(a, second)).sizes
    assert whole.new_stored == whole.stored
    assert added.new_stored <= 0.15 * whole.stored
    assert added.shared_percent > 85


def test_a_checkpoint_of_a_lesser_platform_may_fit(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a, b = node("a"), node("b")
    published(a, checkpoint)
    assert b.platforms("build-1") == ["x86-1"]
    assert b.find("build-1", "x86-2") is None
    found = b.find("build-1", "x86-2", fits=lambda manifest: manifest.facts["processes"] == 2)
    assert found is not None
    assert found.platform == "x86-1"
    newer = published(a, dataclasses.replace(checkpoint, platform="x86-2"))
    assert b.find("build-1", "x86-2", fits=lambda manifest: True) == a.manifest(newer)


def test_only_one_makes_it(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a, b = node("a"), node("b")
    with a.lease("an-app", "build-1", "x86-1").kept() as lease:
        with pytest.raises(Conflict) as refusal:
            b.lease("an-app", "build-1", "x86-1")
        assert refusal.value.details["reason"] == "in_progress"
        a.publish(lease, checkpoint)
    assert b.lease("an-app", "build-1", "x86-1").number == 2


def test_a_late_writer_cannot_publish_over_a_newer_one(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a, b = node("a", lease_s=2.0), node("b", lease_s=2.0)
    late = a.lease("an-app", "build-1", "x86-1")  # and never renews
    with pytest.raises(Conflict):
        b.lease("an-app", "build-1", "x86-1")
    threading.Event().wait(2.2)
    with b.lease("an-app", "build-1", "x86-1").kept() as lease:
        assert lease.number == 2
        b.publish(lease, checkpoint)
    with pytest.raises(Superseded):
        a.publish(late, checkpoint)
    assert [name.generation for name in b.names()] == [2]


def test_an_older_genuine_manifest_is_refused(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a = node("a")
    published(a, checkpoint)
    newest = published(a, checkpoint)
    b = node("b")
    assert b.find("build-1", "x86-1") == a.manifest(newest)
    (tmp_path / "store" / newest.manifest).unlink()
    with pytest.raises(Untrusted, match="has seen 2"):
        node("b").find("build-1", "x86-1")


def test_a_bucket_that_was_emptied_goes_on_where_it_was(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    """Nodes that have seen generation 2 of a build would refuse what a store begins to count anew."""
    a, b = node("a"), node("b")
    published(a, checkpoint)
    newest = published(a, checkpoint)
    publish_build(a, "an-app", "inputs", "d" * 64, checkpoint.images / "pages-1.img")
    assert b.find("build-1", "x86-1") == a.manifest(newest)
    assert b.find_build("an-app", "inputs") is not None
    for left in (tmp_path / "store").iterdir():
        shutil.rmtree(left)
    for maker, generation in ((a, 3), (node("b"), 4)):
        assert published(maker, checkpoint).generation == generation
        found = node("b").find("build-1", "x86-1")
        assert found is not None and found.name.generation == generation
    assert publish_build(b, "an-app", "inputs", "d" * 64, checkpoint.images / "pages-1.img").number == 2


def test_a_manifest_under_another_name_is_refused(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a = node("a")
    name = published(a, checkpoint)
    for other in (CheckpointName("build-2", "x86-1", 1), CheckpointName("build-1", "x86-1", 9)):
        copy = tmp_path / "store" / other.manifest
        copy.parent.mkdir(parents=True)
        copy.write_bytes((tmp_path / "store" / name.manifest).read_bytes())
        with pytest.raises(Untrusted, match="signature"):
            node("b").find(other.build, other.platform)


def test_without_the_regions_key_nothing_is_accepted(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    published(node("a"), checkpoint)
    with pytest.raises(Untrusted, match="neither this node's nor its region's"):
        node("stranger", key_file=None).find("build-1", "x86-1")


@pytest.mark.parametrize("kind", ["chunk", "index", "images", "manifest"])
def test_one_flipped_bit_is_a_refusal(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path, kind: str
) -> None:
    name = published(node("a"), checkpoint)
    if kind == "chunk":
        victims = [path for path in (tmp_path / "store" / "chunk").rglob("*") if path.is_file()]
    else:
        victims = [tmp_path / "store" / getattr(name, kind)]
    for victim in victims:
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    b = node("b")
    assert not b.verify(name).clean
    with pytest.raises(Untrusted):
        manifest = b.find("build-1", "x86-1")
        assert manifest is not None
        b.pull(manifest.name)


def test_what_takes_the_place_of_a_damaged_one_is_sent_whole(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a, b = node("a"), node("b")
    first = published(a, checkpoint)
    victim = next(path for path in (tmp_path / "store" / "chunk").rglob("*") if path.is_file())
    sound = victim.read_bytes()
    victim.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert not b.verify(published(a, checkpoint)).clean, "as the chunk was there it was not sent"
    with a.lease("an-app", "build-1", "x86-1").kept() as lease:
        mended = a.publish(lease, checkpoint, mend=True)
    assert b.verify(mended.name).clean and b.verify(first).clean


def test_a_layer_too(node: Nodes, tmp_path: Path) -> None:
    a, b = node("a"), node("b")
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"a layer" * 1000)
    publish_build(a, "x", "i", "d" * 64, layer)
    for kind in ("chunk/*/*/*", "layer/*/*/*"):
        (found,) = (tmp_path / "store").glob(kind)
        found.write_bytes(found.read_bytes()[:-1] + b"?")
    with a.build_lease("i").kept() as lease:
        a.publish_build(
            lease, "x", "i", {}, ["d" * 64], lambda _, file: shutil.copyfile(layer, file), mend=True
        )
    b.fetch_layer("d" * 64, tmp_path / "copy.tar")
    assert (tmp_path / "copy.tar").read_bytes() == layer.read_bytes()


def test_a_bad_working_set_costs_time_only(node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path) -> None:
    a, b = node("a"), node("b")
    manifest = a.manifest(published(a, checkpoint))
    a.publish_working_set(manifest, [PageRun("pages-1.img", 1, 600)], read_from_files(checkpoint.images))
    part = tmp_path / "store" / manifest.name.working_sets / "1" / "0"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    fetched = b.fetch(manifest.name)
    fetched.pages.prefetch()
    fetched.pages.ensure("pages-1.img", 1, 600)
    assert b.fill(fetched)
    assert same_pages(fetched.images, checkpoint)
    fetched.close()
    assert not b.verify(manifest.name).clean


def test_what_the_cache_holds_is_not_trusted_either(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    b = node("b")
    name = published(node("a"), checkpoint)
    fetched = b.fetch(name)
    fetched.pages.ensure("pages-1.img", 0, 300)
    fetched.close()
    image = fetched.images / "pages-1.img"
    data = bytearray(image.read_bytes())
    data[PAGE * 10] ^= 1
    image.write_bytes(data)
    b.pull(name)
    assert same_pages(fetched.images, checkpoint)
    (fetched.directory / "index.sealed").write_bytes(b"nonsense")
    with pytest.raises(Untrusted):
        b.fetch(name)
    b.pull(name)  # the damaged entry is gone


def test_what_lies_on_disks_is_private(node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path) -> None:
    published(node("a"), checkpoint)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    b = node("b")
    b.pull(b.names()[0])
    for place in ("store", "b"):
        files = [
            path for path in (tmp_path / place).rglob("*") if path.is_file() and "held" not in path.parts
        ]
        assert {path.stat().st_mode & 0o777 for path in files} == {0o600}, place
    for directory in (b.cache.root, *b.cache.root.iterdir()):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_progress_ends_at_the_end(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a, progress = node("a"), Progress()
    with a.lease("an-app", "build-1", "x86-1").kept() as lease:
        a.publish(lease, checkpoint, progress)
    assert progress.finished
    assert str(progress).startswith("8")  # zero pages are of the total, and never sent
    assert 0 < progress.sent < progress.total


def test_export_and_import(node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path) -> None:
    a = node("a")
    name = published(a, checkpoint)
    a.export(name, tmp_path / "one.relume")
    with (tmp_path / "one.relume").open("rb") as file, pytest.raises(Conflict, match="not newer"):
        a.import_(file)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    b = node("b")
    data = bytearray((tmp_path / "one.relume").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.relume").write_bytes(data)
    with (tmp_path / "bad.relume").open("rb") as file, pytest.raises(Untrusted):
        b.import_(file)
    assert b.names() == []
    with (tmp_path / "one.relume").open("rb") as file:
        assert b.import_(file) == name
    assert b.verify(name).clean
    b.pull(name)
    assert published(b, checkpoint).generation > name.generation


def test_standing(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    a, b = node("a"), node("b")
    first = published(a, checkpoint)
    assert b.standing(first) == "current"
    second = published(a, checkpoint)
    assert (b.standing(first), b.standing(second)) == ("superseded", "current")
    a.remove(second)
    assert b.standing(second) == "removed"
    assert b.standing(CheckpointName("build-9", "x86-1", 1)) == "missing"


def test_layers_and_builds(node: Nodes, tmp_path: Path) -> None:
    a, b = node("a"), node("b")
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"a layer" * 100_000)
    assert b.find_build("an-app", "inputs-1") is None
    build = publish_build(a, "an-app", "inputs-1", "d" * 64, layer, {"numpy": "2.0"})
    assert (build.number, build.layers[0].size) == (1, layer.stat().st_size)
    assert b.find_build("an-app", "inputs-1") == build
    assert b.find_build("another-app", "inputs-1") is None
    b.fetch_layer("d" * 64, tmp_path / "copy.tar")
    assert (tmp_path / "copy.tar").read_bytes() == layer.read_bytes()
    with pytest.raises(ObjectMissing):
        b.fetch_layer("e" * 64, tmp_path / "none.tar")


def test_the_newest_build_counts(node: Nodes, tmp_path: Path) -> None:
    a, b = node("a"), node("b")
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"a layer" * 1000)
    for version in ("2.0", "2.1"):
        publish_build(a, "x", "i", "d" * 64, layer, {"numpy": version})
    newest = b.find_build("x", "i")
    assert newest is not None and (newest.number, newest.facts) == (2, {"numpy": "2.1"})
    (record,) = (tmp_path / "store").rglob("build/*/*/i/2")
    record.unlink()
    with pytest.raises(Untrusted, match="this node has seen 2"):
        b.find_build("x", "i")


def test_removing_an_app_removes_its_builds(node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path) -> None:
    a, stranger = node("a"), node("stranger", key_file=None)
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"a layer" * 1000)
    published(a, checkpoint)
    foreign = published(stranger, dataclasses.replace(checkpoint, build="build-2"))
    for app in ("an-app", "another"):
        publish_build(a, app, "i", "d" * 64, layer)
    assert len(a.remove_app("an-app")) == 1
    assert a.remove_builds("an-app") == 1
    assert a.find_build("an-app", "i") is None
    assert a.find_build("another", "i") is not None
    assert a.names() == [foreign], "what it cannot read is not its own to remove"


def test_one_builder_at_a_time(node: Nodes, tmp_path: Path) -> None:
    a, b = node("a"), node("b")
    with a.build_lease("i").kept():
        with pytest.raises(Conflict):
            b.build_lease("i")
        assert b.is_building("i")
    assert not b.is_building("i")
    assert b.build_lease("i").number == 2


@pytest.mark.parametrize("kind", ["build/*/*/i/1", "layer/*/*/*"])
def test_a_build_with_a_flipped_bit_is_refused(node: Nodes, tmp_path: Path, kind: str) -> None:
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"a layer" * 1000)
    publish_build(node("a"), "x", "i", "d" * 64, layer)
    (found,) = (tmp_path / "store").glob(kind)
    content = bytearray(found.read_bytes())
    content[len(content) // 2] ^= 1
    found.write_bytes(content)
    with pytest.raises(Untrusted):
        b = node("b")
        b.find_build("x", "i")
        b.fetch_layer("d" * 64, tmp_path / "copy")


def test_a_store_that_is_gone_is_a_clear_error(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    a = node("a")
    lease = a.lease("an-app", "build-1", "x86-1")
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(StoreError):
        a.publish(lease, checkpoint)


def test_a_prefetched_working_set_needs_no_store(
    node: Nodes, checkpoint: LocalCheckpoint, tmp_path: Path
) -> None:
    """Another process (the pager) recognises on the disk what the node fetched, and does not believe what it finds."""
    a = node("a")
    manifest = a.manifest(published(a, checkpoint))
    runs = [PageRun("pages-2.img", 5, 20), PageRun("pages-1.img", 1, 600)]
    a.publish_working_set(manifest, runs, read_from_files(checkpoint.images))
    node("b").prefetch(manifest.name)
    (tmp_path / "store").rename(tmp_path / "away")
    fetched = node("b").fetch(manifest.name)
    for run in runs:
        fetched.pages.ensure(run.stream, run.first, run.pages)
    fetched.close()
    image = fetched.images / "pages-2.img"
    data = bytearray(image.read_bytes())
    data[6 * PAGE] ^= 1
    image.write_bytes(data)
    fetched = node("b").fetch(manifest.name)
    with pytest.raises(StoreError):
        fetched.pages.ensure("pages-2.img", 6, 1)
    fetched.close()
    (tmp_path / "store").rmdir()
    (tmp_path / "away").rename(tmp_path / "store")
    node("b").pull(manifest.name)
    assert same_pages(fetched.images, checkpoint)


def test_a_node_that_has_not_all_pages_publishes_no_zeros(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    b = node("b")
    fetched = b.fetch(published(node("a"), checkpoint))
    run = PageRun("pages-1.img", 100, 50)
    b.publish_working_set(fetched.manifest, [run], fetched.pages.read)
    fetched.close()
    c = node("c").fetch(fetched.manifest.name)
    c.pages.prefetch()
    original = (checkpoint.images / "pages-1.img").read_bytes()
    assert c.pages.read(run) == original[100 * PAGE : 150 * PAGE]
    c.close()


def test_closing_waits_for_what_is_on_its_way(node: Nodes, checkpoint: LocalCheckpoint) -> None:
    """A descriptor that is closed under a write could by then be another file's."""
    name = published(node("a"), checkpoint)
    fetched = node("b").fetch(name)
    coming, closed = threading.Event(), threading.Event()

    def slow(point: str) -> None:
        if point == "fetch.chunk":
            coming.set()
            assert not closed.wait(0.3)

    faults.install(slow)
    thread = threading.Thread(target=fetched.pages.ensure, args=("pages-1.img", 1, 1))
    thread.start()
    assert coming.wait(5)
    fetched.close()
    closed.set()
    thread.join()
    with pytest.raises(StoreError, match="was closed"):
        fetched.pages.ensure("pages-2.img", 1, 1)
    assert fetched.pages.fill() is False
