"""Nodes that share a bucket: what one has learned another starts with, and refuses when a bit of it is wrong.

All run on this machine with state directories of their own. Each new node deploys the same directory (so it has
the same build) and has none of the first one's checkpoints. localbucket keeps objects as files, so that they can be
damaged behind the nodes' backs; each kind of damage gets a copy of the bucket's folder and a node of its own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e import store_servers as servers

from harness import SNIPPET, App, Relume, get, share_builds, until
from relume.store import new_key_file

#: 12 MiB that don't compress, half of which an answer needs.
PROGRAM = f"""
import random
WEIGHTS = random.Random(7).randbytes(12 << 20)
ACTIONS["sum"] = lambda _: {{"sum": sum(WEIGHTS[: 6 << 20 : 512]), "boot": STATE["boot"]}}
{SNIPPET}
serve()
"""


@dataclass
class Region:
    """A bucket with one checkpoint and its working set, and the node that made them."""

    root: Path
    endpoint: str
    key: Path
    relume: Relume
    app: App
    first: Relume
    checkpoint_id: str
    answer: dict[str, Any]

    def objects(self, prefix: str = "region") -> Path:
        return self.root / "localbucket" / "bucket" / prefix

    @contextlib.contextmanager
    def node(
        self, name: str, *, prefix: str = "region", key: bool = True, endpoint: str = "", **settings: Any
    ) -> Iterator[Relume]:
        """Another node of the region, which has the build."""
        with _node(
            self.root,
            name,
            servers.url(endpoint or self.endpoint, prefix=prefix),
            self.key if key else None,
            self.relume,
            **settings,
        ) as node:
            node.deploy(self.app.directory)
            yield node


@contextlib.contextmanager
def _node(
    root: Path, name: str, url: str, key: Path | None, builds: Relume, **settings: Any
) -> Iterator[Relume]:
    state = root / name
    state.mkdir(mode=0o700)
    share_builds(builds, state)
    settings |= {"key_file": str(key)} if key else {}
    lines = ["[store]", f'url = "{url}"', "[region]"]
    lines += [f"{option} = {json.dumps(value)}" for option, value in settings.items()]
    config = root / f"{name}.toml"
    config.write_text("\n".join(lines) + "\n")
    credentials = {"AWS_ACCESS_KEY_ID": servers.USER, "AWS_SECRET_ACCESS_KEY": servers.PASSWORD}
    node = Relume(state, config=config, env=credentials)
    node.start_node()
    try:
        yield node
    finally:
        node.close()
        shutil.rmtree(state, ignore_errors=True)
    assert "Traceback" not in node.log.read_text(), node.log.read_text()[-8000:]


@pytest.fixture(scope="module")
def region(workplace: Path, relume: Relume) -> Iterator[Region]:
    root = workplace / "region"
    root.mkdir(mode=0o700)
    key = root / "region.key"
    new_key_file(key)
    app = App(root / "app", "travels").write(PROGRAM, ready="/sum")
    with (
        servers.localbucket(root) as endpoint,
        _node(root, "first", servers.url(endpoint), key, relume) as first,
    ):
        first.deploy(app.directory)
        original = first.start(app.name)
        made = first.answer_of_post(original["instance_id"])
        assert made["status"] == "created", made
        answer = get(original, "/sum")
        until(
            lambda: first.checkpoints(app.name)[0]["where"] == ["local", "remote"], 30, first.log.read_text()
        )
        copy = first.start(app.name)  # from its own disk; what it learns is published
        assert copy["restored"] and "store_bytes" not in copy["trace"]
        assert get(copy, "/sum") == answer
        sets = root / "localbucket" / "bucket" / "region" / "working-set"
        until(lambda: list(sets.rglob("list")), 30, first.log.read_text())
        yield Region(root, endpoint, key, relume, app, first, made["checkpoint_id"], answer)
    shutil.rmtree(root, ignore_errors=True)


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
        assert node.json("checkpoints", "export", region.checkpoint_id, str(file))["bytes"] > 12 << 20
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


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _flip_all(objects: Path, pattern: str) -> None:
    found = [path for path in objects.glob(pattern) if path.is_file()]
    assert found, pattern
    for path in found:
        _flip(path)


def _chunks_without_working_set(objects: Path) -> None:
    shutil.rmtree(objects / "working-set")
    _flip_all(objects, "chunk/*/*/*")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest": (lambda objects: _flip_all(objects, "checkpoint/*/*/*/manifest"), "manifest"),
    "index": (lambda objects: _flip_all(objects, "checkpoint/*/*/*/index"), "index"),
    "images": (lambda objects: _flip_all(objects, "checkpoint/*/*/*/images"), "images"),
    "chunks": (_chunks_without_working_set, "chunk"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_one_bit(region: Region, kind: str) -> None:
    """Refused before the first instruction, with the reason; the app boots cold."""
    damage, reason = REFUSED[kind]
    shutil.copytree(region.objects(), region.objects(f"bad-{kind}"))
    damage(region.objects(f"bad-{kind}"))
    with region.node(f"node-{kind}", prefix=f"bad-{kind}") as node:
        started = node.start(region.app.name)
        assert not started["restored"]
        assert reason in started["reason"], started
        assert get(started, "/sum")["sum"] == region.answer["sum"]
        assert "is quarantined here" in node.log.read_text()
        assert region.checkpoint_id not in {
            row["checkpoint_id"] for row in node.checkpoints(region.app.name) if row["state"] == "ready"
        }


@pytest.mark.parametrize("part", ["list", "0"])
def test_one_bit_of_the_working_set(region: Region, part: str) -> None:
    """It is useless then, and harmless: the pages come from their chunks."""
    prefix = f"bad-set-{part}"
    shutil.copytree(region.objects(), region.objects(prefix))
    _flip_all(region.objects(prefix), f"working-set/*/*/*/*/{part}")
    with region.node(f"node-set-{part}", prefix=prefix) as node:
        copy = node.start(region.app.name)
        assert copy["restored"], copy
        assert get(copy, "/sum") == region.answer


def test_bytes_that_turn_out_wrong_while_it_runs(region: Region) -> None:
    """The working set is right, so it runs; the fill meets a wrong chunk: it is killed, and another takes its place."""
    shutil.copytree(region.objects(), region.objects("bad-late"))
    _flip_all(region.objects("bad-late"), "chunk/*/*/*")
    with region.node("node-late", prefix="bad-late") as node:
        started = node.start(region.app.name)
        if started["restored"]:
            with contextlib.suppress(OSError):
                get(started, "/sum")  # the first answer starts the fill

        def replaced() -> Any:
            rows = [row for row in node.ps(region.app.name) if row["state"] == "ready"]
            return [row for row in rows if not row["restored"]]

        (cold,) = until(replaced, 60, node.log.read_text())[:1]
        assert get(cold, "/sum")["sum"] == region.answer["sum"]
        assert "is quarantined here" in node.log.read_text()


def test_the_store_goes_during_a_start(region: Region) -> None:
    port = servers.free_port()
    backend = int(region.endpoint.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(servers.FaultProxy(backend))
        node = stack.enter_context(region.node("alone", endpoint=proxy.endpoint))
        proxy.gone = True
        started = node.start(region.app.name)
        assert not started["restored"]
        assert "store" in started["reason"], started
        assert get(started, "/sum")["sum"] == region.answer["sum"]
        proxy.gone = False


def test_a_store_that_cannot_exclude(region: Region, relume: Relume) -> None:
    """A node that would share it says why it does not run."""
    with servers.juicefs_gateway(region.root) as endpoint, pytest.raises(AssertionError, match="create-if-absent|exclusive|If-None-Match"):
        with _node(region.root, "refusing", servers.url(endpoint, bucket="jfs"), region.key, relume):
            pass
