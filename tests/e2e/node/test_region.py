"""Nodes that share a bucket: what one has learned another starts with, and refuses when a bit of it is wrong.

Each kind of damage gets a copy of the bucket's folder and a node of its own.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import store_servers as servers
from e2e.node.regions import Region, node_of
from harness import Relume, get, until


def test_a_node_that_has_never_seen_it(region: Region) -> None:
    with region.node("second") as node:
        (row,) = node.checkpoints(region.app.name)
        assert (row["checkpoint_id"], row["where"]) == (region.checkpoint_id, ["remote"])
        copy = node.start(region.app.name)
        assert copy["restored"], copy
        assert copy["checkpoint_id"] == region.checkpoint_id
        assert copy["memory"] == "paged"
        assert get(copy, "/sum") == region.answer
        assert copy["trace"]["store_requests"] > 0
        total = sum(path.stat().st_size for path in region.objects().rglob("chunk/**/*") if path.is_file())
        assert 0 < copy["trace"]["store_bytes"] < total
        (row,) = [row for row in node.ps(region.app.name) if row["state"] == "ready"]
        needed = sum(path.stat().st_size for path in region.objects().glob("working-set/*/*/*/1/*"))
        assert row["store_bytes"] <= 1.3 * needed, (row, needed)
        until(
            lambda: node.checkpoints(region.app.name)[0]["where"] == ["local", "remote"],
            60,
            node.log.read_text(),
        )
        again = node.start(region.app.name)
        assert again["restored"] and "store_bytes" not in again["trace"], "the second start is local"
        assert get(again, "/sum") == region.answer
        assert node.json("checkpoints", "verify", region.checkpoint_id)["ok"]


def test_its_own_checkpoint_is_not_made_again(region: Region) -> None:
    with region.node("third") as node:
        cold = node.start(region.app.name, "--no-restore")
        answer = node.answer_of_post(cold["instance_id"])
        assert (answer["status"], answer["reason"]) == ("skipped", "exists"), answer
        assert answer["checkpoint_id"] == region.checkpoint_id

        pulled = node.json("checkpoints", "pull", region.checkpoint_id)
        assert pulled["checkpoint_id"] == region.checkpoint_id
        copy = node.start(region.app.name)
        assert copy["restored"] and "store_bytes" not in copy["trace"], "what was pulled is local"
        assert get(copy, "/sum") == region.answer
        inspected = node.json("checkpoints", "inspect", region.checkpoint_id)
        assert inspected["would_be_used"], inspected

        file = region.root / "exported"
        assert node.json("checkpoints", "export", region.checkpoint_id, str(file))["bytes"] > 48 << 20
        assert node.json("checkpoints", "gc")["dry_run"]
        with region.node("fourth", prefix="elsewhere") as other:
            imported = other.json("checkpoints", "import", str(file))
            assert imported["checkpoint_id"] == region.checkpoint_id
            assert other.json("checkpoints", "verify", region.checkpoint_id)["ok"]
            copy = other.start(region.app.name)
            assert copy["restored"], copy
            assert get(copy, "/sum") == region.answer
            other.run("checkpoints", "rm", region.checkpoint_id)
            assert other.checkpoints(region.app.name) == []


def test_a_build_changed_by_a_line_adds_little(region: Region) -> None:
    """Of memory that did not change a few chunks at either end are new, however large it is: 6 MB now and then."""
    changing = region.root / "changing"
    shutil.copytree(region.app.directory, changing)
    main = changing / "main.py"
    main.write_text(main.read_text().replace("48 << 20", "160 << 20"))
    with region.node("next", prefix="next") as node:
        first = published(node, changing)
        with main.open("a") as file:
            file.write("# a line\n")
        second = published(node, changing)
        assert first["new_stored_bytes"] > 160 << 20
        assert second["new_stored_bytes"] <= 0.15 * first["stored_bytes"], (first, second)


def published(node: Relume, directory: Path) -> dict[str, Any]:
    """Deploy it, start it cold, and have its checkpoint in the store; what is said of it there."""
    deployed = node.deploy(directory)
    original = node.start(deployed["app"])
    assert (original["build_id"], original["restored"]) == (deployed["build_id"], False)
    made = node.answer_of_post(original["instance_id"])

    def there() -> bool:
        (row,) = [
            row for row in node.checkpoints(deployed["app"]) if row["checkpoint_id"] == made["checkpoint_id"]
        ]
        return "remote" in row["where"]

    until(there, 60, node.log.read_text())
    said: dict[str, Any] = node.json("checkpoints", "inspect", made["checkpoint_id"])["region"]
    return said


def test_what_was_prefetched_is_here_before_it_is_asked_for(region: Region) -> None:
    with region.node("early", prefetch=True) as node:
        until(lambda: "prefetched" in node.log.read_text(), 30, node.log.read_text())
        (row,) = node.checkpoints(region.app.name)
        assert row["where"] == ["partial", "remote"]
        copy = node.start(region.app.name)
        assert copy["restored"], copy
        assert get(copy, "/sum") == region.answer
        (row,) = [row for row in node.ps(region.app.name) if row["state"] == "ready"]
        needed = sum(path.stat().st_size for path in region.objects().glob("working-set/*/*/*/1/*"))
        assert row["store_bytes"] < needed / 4, row


def test_without_the_key(region: Region) -> None:
    with region.node("keyless", key=False) as node:
        started = node.start(region.app.name)
        assert not started["restored"]
        assert "key" in started["reason"], started
        answer = node.answer_of_post(started["instance_id"])
        assert answer["status"] == "created", "its own, for itself"
        until(lambda: "is not published" in node.log.read_text(), 20, node.log.read_text())
        (row,) = [row for row in node.checkpoints(region.app.name) if "local" in row["where"]]
        assert row["where"] == ["local"]
    assert len(list(region.objects().rglob("manifest"))) == 1


def _flip(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def _flip_all(objects: Path, pattern: str, at: int | None = None) -> None:
    found = [path for path in objects.glob(pattern) if path.is_file()]
    assert found, pattern
    for path in found:
        _flip(path, at)


def _flip_chunks(region: Region, objects: Path, *, of_pages: bool) -> None:
    pages = region.chunks_of_pages()
    found = [path for path in objects.glob("chunk/*/*/*") if (path.name in pages) == of_pages]
    assert found
    for path in found:
        _flip(path)


def _memory_without_working_set(region: Region, objects: Path) -> None:
    shutil.rmtree(objects / "working-set")
    _flip_chunks(region, objects, of_pages=True)


def _move_to_another_generation(_: Region, objects: Path) -> None:
    """A genuine checkpoint under a name that its maker did not give it."""
    (generation,) = objects.glob("checkpoint/*/*/*")
    generation.rename(generation.with_name("77"))


def _flip_working_set(part: str, _: Region, objects: Path) -> None:
    _flip_all(objects, f"working-set/*/*/*/*/{part}")


def _grow(_: Region, objects: Path) -> None:
    (index,) = objects.glob("checkpoint/*/*/*/index")
    with index.open("r+b") as file:
        file.truncate(300 << 20)  # sparse: more than any index may have


REFUSED: dict[str, tuple[Callable[[Region, Path], None], str]] = {
    "manifest": (lambda _, objects: _flip_all(objects, "checkpoint/*/*/*/manifest"), "manifest"),
    "version": (lambda _, objects: _flip_all(objects, "checkpoint/*/*/*/manifest", 6), "format version"),
    "another name": (_move_to_another_generation, "signature of"),
    "index": (lambda _, objects: _flip_all(objects, "checkpoint/*/*/*/index"), "index"),
    "size": (_grow, "nothing of its kind is larger"),
    "images": (lambda _, objects: _flip_all(objects, "checkpoint/*/*/*/images"), "images"),
    "held files": (lambda region, objects: _flip_chunks(region, objects, of_pages=False), "chunk"),
    "memory": (_memory_without_working_set, "chunk"),
}


def _damaged(node: Relume, region: Region, damage: Callable[[Region, Path], None]) -> Any:
    """A start of a node that has nothing here, from the store with this damage."""
    objects = region.objects("bad")
    node.stop(region.app.name)
    node.kill_node(signal.SIGTERM)
    shutil.rmtree(objects, ignore_errors=True)
    shutil.rmtree(node.state / "region" / "cache")
    shutil.copytree(region.objects(), objects)
    damage(region, objects)
    node.start_node()
    return node.start(region.app.name, "-e", "QUIET=1")


@pytest.mark.parametrize(
    "kinds",
    [
        ("manifest", "memory"),
        pytest.param(tuple(REFUSED), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
    ids=["two", "all"],
)
def test_one_bit_of_each_kind(region: Region, kinds: tuple[str, ...]) -> None:
    """Refused before the first instruction, with the reason, and booted cold."""
    with region.node("flipped", prefix="bad") as node:
        for kind in kinds:
            damage, reason = REFUSED[kind]
            started = _damaged(node, region, damage)
            assert not started["restored"], kind
            assert reason in started["reason"], started
            assert get(started, "/sum")["sum"] == region.answer["sum"]
            rows = [row for row in node.json("checkpoints", "ls") if "remote" in row["where"]]
            assert [row["state"].partition(":")[0] for row in rows] in (["quarantined"], ["refused"]), rows


def test_a_damaged_working_set_costs_time_only(region: Region) -> None:
    with region.node("aimless", prefix="bad") as node:
        for part in ("list", "0"):
            started = _damaged(node, region, partial(_flip_working_set, part))
            assert started["restored"], started
            assert get(started, "/sum") == region.answer


def test_bytes_that_turn_out_wrong_while_it_runs(region: Region) -> None:
    """What an answer needs is right, so it runs; the fill meets a wrong chunk: killed, another takes its place."""
    objects = region.objects("late")
    shutil.copytree(region.objects(), objects)
    chunks = region.chunks_of_pages()
    wrong = chunks[len(chunks) // 2]  # most of memory is what no answer needs
    (path,) = objects.glob(f"chunk/*/*/{wrong}")
    _flip(path)
    with (
        servers.FaultProxy(region.endpoint) as proxy,
        region.node("late", prefix="late", endpoint=proxy.endpoint) as node,
    ):
        proxy.only = lambda path: wrong in path
        proxy.every, proxy.latency_s, proxy.fault = 1, 60, "latency"
        started = node.start(region.app.name)
        assert started["restored"], started
        assert get(started, "/sum") == region.answer
        proxy.fault = ""

        def replaced() -> Any:
            rows = [row for row in node.ps(region.app.name) if row["state"] == "ready"]
            return [row for row in rows if not row["restored"]]

        cold = until(replaced, 60, node.log.read_text())[0]
        assert get(cold, "/sum")["sum"] == region.answer["sum"]
        ended = [row for row in node.ps(region.app.name) if row["instance_id"] == started["instance_id"]]
        assert ended[0]["state"] != "ready"
        assert "is quarantined here" in node.log.read_text()


def test_the_store_goes_during_a_start(region: Region) -> None:
    with (
        servers.FaultProxy(region.endpoint) as proxy,
        region.node("alone", endpoint=proxy.endpoint, start_wait_s=3.0) as node,
    ):
        proxy.fault = "outage"
        started = node.start(region.app.name)
        assert not started["restored"]
        assert "the region's store" in started["reason"], started
        assert get(started, "/sum")["sum"] == region.answer["sum"]
        proxy.fault = ""


def test_a_store_that_does_not_exclude(region: Region, relume: Relume) -> None:
    """The node says why it will not share it, and does not run."""
    with servers.juicefs_gateway(region.root) as endpoint:
        url = servers.url(endpoint, bucket="jfs")
        with (
            pytest.raises(AssertionError, match=r"\[store\] url: .* create-if-absent"),
            node_of(region.root, "refusing", url, region.key, relume),
        ):
            pass


def test_one_checkpoint_for_all_and_a_node_that_dies_in_its_upload(region: Region) -> None:
    with region.node("one", prefix="race") as one, region.node("two", prefix="race") as two:
        with ThreadPoolExecutor(2) as pool:
            started = list(pool.map(lambda node: node.start(region.app.name), (one, two)))
        answers = [
            node.answer_of_post(each["instance_id"])
            for node, each in zip((one, two), started, strict=True)
            if not each["restored"]
        ]
        made = [answer for answer in answers if answer["status"] == "created"]
        assert len(made) == 1, answers
        assert {answer["reason"] for answer in answers} <= {None, "in_progress", "exists"}, answers
        maker = (one, two)[answers.index(made[0])]
        maker.kill_node()
        maker.start_node()
        until(
            lambda: maker.checkpoints(region.app.name)[0]["where"] == ["local", "remote"],
            60,
            maker.log.read_text(),
        )
        assert maker.json("checkpoints", "verify", made[0]["checkpoint_id"])["ok"]
        assert len(list(region.objects("race").rglob("manifest"))) == 1
