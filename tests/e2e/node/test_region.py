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
