"""A build between two nodes: the layers come out the same, and what is not that build is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relume.build import Build, Builder, Layer, Planned, travel, tree
from relume.build import plan as plans
from relume.build.builder import guest
from relume.build.depot import Depot, Made
from relume.build.files import AppFiles
from relume.config import load_app
from relume.errors import Untrusted
from relume.store import pack_tree, unpack_tree

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="devices and owners need root")


def _tree(root: Path) -> Path:
    """One of everything that a layer may have."""
    root.mkdir(mode=0o755)
    (root / "bin").mkdir(mode=0o1777)
    (root / "bin" / "tool").write_bytes(b"tool" * 5000)
    (root / "bin" / "tool").chmod(0o4755)
    os.link(root / "bin" / "tool", root / "bin" / "same-tool")
    (root / "bin" / "link").symlink_to("../../etc/passwd")
    (root / "bin" / b"caf\xe9".decode("utf-8", "surrogateescape")).write_text("not UTF-8")
    os.chown(root / "bin" / "link", 1000, 1000, follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 0))
    os.mknod(root / "deleted", stat.S_IFCHR, 0)
    os.setxattr(root / "bin", "trusted.overlay.opaque", b"y")
    os.setxattr(
        root / "bin" / "tool",
        "security.capability",
        bytes.fromhex("0100000200040000000000000000000000000000"),
    )
    os.setxattr(root, "user.top", b"the top folder")
    os.utime(root / "bin" / "same-tool", ns=(10**18 + 7, 10**18 + 7))
    return root


def test_a_layer_comes_back_with_its_digest_and_times(tmp_path: Path) -> None:
    source, target = _tree(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    with (tmp_path / "layer").open("wb") as out:
        pack_tree(source, out, layer=True)
    with (tmp_path / "layer").open("rb") as file:
        unpack_tree(file, target, "test", layer=True)
    assert tree.digest(target) == tree.digest(source)
    times = {path: status.st_mtime_ns for path, status in tree.walk(source)}
    assert {path: status.st_mtime_ns for path, status in tree.walk(target)} == times


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    app = tmp_path / "app"
    app.mkdir()
    (app / "cerebrium.toml").write_text(
        '[cerebrium.deployment]\nname = "app"\n[cerebrium.runtime.custom]\nentrypoint = ["true"]\nport = 8000\n'
    )
    config = load_app(app)
    plan = plans.plan(config, app, AppFiles(app, ()), None, "guest")
    return Planned(plan, config, guest.for_app(config))


def _made(builder: Builder, depot: Depot, planned: Planned, tree_: Path) -> Build:
    """As a build leaves it: a layer, an index entry, a record."""
    layer = asyncio.run(depot.publish(_tree(tree_)))
    depot.record("base", "a" * 64, Made(layer, {"base": "a base"}))
    build = Build(
        build_id=plans.build_id(planned.inputs, [layer.digest], 2),
        app=planned.app,
        inputs_digest=planned.inputs,
        layers=(layer,),
        argv=("true",),
        env={"A": "b"},
        cwd="/cortex",
        user="0:0",
        port=8000,
        checkpointing=planned.plan.checkpointing,
        config=plans.snapshot(planned.config),
        base="a base",
        resolved={"pip": {"numpy": "2.0"}},
        created_at=1.0,
    )
    depot.save(build)
    return build


def _copy(layer: Layer) -> Callable[[str, Path], None]:
    def fetch(digest: str, directory: Path) -> None:
        tar = directory.with_suffix(".tar")
        with tar.open("wb") as out:
            pack_tree(layer.path, out, layer=True)
        with tar.open("rb") as file:
            unpack_tree(file, directory, digest, layer=True)

    return fetch


def test_another_node_adopts_it(tmp_path: Path, planned: Planned) -> None:
    one, two = Builder(tmp_path / "one"), Builder(tmp_path / "two")
    depot = Depot(tmp_path / "one")
    build = _made(one, depot, planned, depot.tmp / "tree")
    facts, digests = one.facts_of(build), [layer.digest for layer in build.layers]
    assert two.missing(digests) == digests
    adopted, there = asyncio.run(two.adopt(planned, facts, digests, _copy(build.layers[0])))
    assert not there
    assert two.missing(digests) == []
    assert dataclasses.replace(adopted, layers=build.layers) == build
    assert two.load(build.build_id) == adopted
    assert tree.digest(adopted.layers[0].path) == build.layers[0].digest
    known = Depot(tmp_path / "two").lookup("base", "a" * 64)
    assert known is not None and known.facts == {"base": "a base"}, "the next build there begins from it"

    def never(digest: str, directory: Path) -> None:
        raise AssertionError("it is there")

    again, there = asyncio.run(two.adopt(planned, facts, digests, never))
    assert there and again.build_id == build.build_id
    assert asyncio.run(two.make(planned))[1], "and a deploy without the region finds it"


def test_a_layer_with_other_content_is_refused(tmp_path: Path, planned: Planned) -> None:
    one, two = Builder(tmp_path / "one"), Builder(tmp_path / "two")
    depot = Depot(tmp_path / "one")
    build = _made(one, depot, planned, depot.tmp / "tree")
    (build.layers[0].path / "bin" / "tool").write_bytes(b"evil" * 5000)
    digests = [build.layers[0].digest]
    with pytest.raises(Untrusted, match="came with other content"):
        asyncio.run(two.adopt(planned, one.facts_of(build), digests, _copy(build.layers[0])))
    assert two.builds() == []
    assert two.missing(digests) == digests
    assert not list((tmp_path / "two" / "tmp").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"build_id": "0" * 32},
        {"build_id": "../evil"},
        {"argv": []},
        {"argv": [1]},
        {"argv": None},
        {"env": ["A"]},
        {"env": {"A": "b\0c"}},
        {"cwd": "relative"},
        {"user": "root"},
        {"port": 9},
        {"checkpointing": None},
        {"resolved": 7},
        {"stages": [{"kind": "../x", "key": "a" * 64, "layer": "LAYER", "facts": {}}]},
        {"stages": [{"kind": "base", "key": "../x", "layer": "LAYER", "facts": {}}]},
        {"stages": [{"kind": "base", "key": "a" * 64, "layer": "f" * 64, "facts": {}}]},
        {"stages": None},
    ],
    ids=str,
)
def test_facts_that_are_not_a_build_are_refused(
    tmp_path: Path, planned: Planned, change: dict[str, Any]
) -> None:
    one, two = Builder(tmp_path / "one"), Builder(tmp_path / "two")
    depot = Depot(tmp_path / "one")
    build = _made(one, depot, planned, depot.tmp / "tree")
    digest = build.layers[0].digest
    if "checkpointing" in change:
        change = {"checkpointing": not build.checkpointing}
    for stage in change.get("stages") or ():
        stage["layer"] = stage["layer"].replace("LAYER", digest)
    with pytest.raises(Untrusted):
        asyncio.run(two.adopt(planned, one.facts_of(build) | change, [digest], _copy(build.layers[0])))
    assert two.builds() == []


def test_what_does_not_travel(tmp_path: Path, planned: Planned) -> None:
    one = Builder(tmp_path / "one")
    depot = Depot(tmp_path / "one")
    facts = travel.facts_of(_made(one, depot, planned, depot.tmp / "tree"), [])
    assert "config" not in facts
    assert str(tmp_path) not in str(facts)
