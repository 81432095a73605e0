"""A build is made once in a region: other nodes adopt it with its layers, and say so; or why they did not."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import store_servers as servers
from e2e.node.regions import node_of
from harness import SNIPPET, App, Relume, get, until
from relume.store import new_key_file

PROGRAM = f"""
import sample
ACTIONS["version"] = lambda _: {{"version": sample.VERSION, "boot": STATE["boot"]}}
exec({SNIPPET!r})
serve()
"""

PIP = '[cerebrium.dependencies.pip]\nsample = "*"\n'


@dataclass
class Bucket:
    """A real S3 server, and nodes that share a folder of its bucket. ``wheels`` is what pip finds packages in."""

    root: Path
    endpoint: str
    key: Path
    wheels: Path
    bases: Relume
    """A node whose made bases others may begin with."""

    def objects(self, prefix: str) -> Path:
        return self.root / "localbucket" / "bucket" / prefix

    @contextlib.contextmanager
    def node(
        self, name: str, prefix: str, *, bases: bool = True, pip: bool = True, endpoint: str = ""
    ) -> Iterator[Relume]:
        """``bases``: it has a base; ``pip``: a build of its own can find packages."""
        with node_of(
            self.root,
            f"{prefix}-{name}",
            servers.url(endpoint or self.endpoint, prefix=prefix),
            self.key,
            self.bases if bases else None,
            {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels if pip else self.root)},
        ) as node:
            yield node


@pytest.fixture(scope="module")
def bucket(workplace: Path, relume: Relume) -> Iterator[Bucket]:
    root = workplace / "travel"
    wheels = root / "wheels"
    wheels.mkdir(mode=0o700, parents=True)
    with zipfile.ZipFile(wheels / "sample-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sample.py", "VERSION = '1.0'\n")
        wheel.writestr("sample-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
        wheel.writestr(
            "sample-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("sample-1.0.dist-info/RECORD", "")
    new_key_file(root / "region.key")
    with servers.localbucket(root) as endpoint:
        yield Bucket(root, endpoint, root / "region.key", wheels, relume)
    shutil.rmtree(root, ignore_errors=True)


def _layers(node: Relume, build_id: str) -> Any:
    return json.loads((node.state / "builds" / "builds" / f"{build_id}.json").read_text())["layers"]


@dataclass
class Pair:
    """Two nodes and an app with a package from pip, which the first one has built and checkpointed.

    The second has no base, and no package index that it could build from.
    """

    a: Relume
    b: Relume
    app: App
    made: dict[str, Any]
    answer: dict[str, Any]


@pytest.fixture(scope="module")
def pair(bucket: Bucket) -> Iterator[Pair]:
    app = App(bucket.root / "app", "adopted").write(PROGRAM, ready="/version", extra=PIP)
    with bucket.node("a", "one") as a, bucket.node("b", "one", bases=False, pip=False) as b:
        made = a.deploy(app.directory)
        original = a.start(app.name)
        assert a.answer_of_post(original["instance_id"])["status"] == "created"
        until(lambda: a.checkpoints(app.name)[0]["where"] == ["local", "remote"], 60, a.log.read_text())
        answer = get(original, "/version")
        a.stop(app.name)
        yield Pair(a, b, app, made, answer)


def test_built_and_published(pair: Pair) -> None:
    assert (pair.made["how"], pair.made["in_region"], pair.made["reason"]) == ("built", True, None), pair.made
    again = pair.a.deploy(pair.app.directory)
    assert (again["how"], again["build_id"]) == ("reused", pair.made["build_id"])


def test_adopted_and_restored(pair: Pair) -> None:
    deployed = pair.b.run("deploy", str(pair.app.directory), "-y")
    assert "adopted from the region" in deployed.stderr, deployed.stderr
    assert "pip: installing" not in deployed.stderr and "base:" not in deployed.stderr, deployed.stderr
    build_id = pair.made["build_id"]
    assert f"build {build_id} (adopted)" in deployed.stdout
    assert _layers(pair.b, build_id) == _layers(pair.a, build_id)
    until(lambda: "prefetched" in pair.b.log.read_text(), 30, pair.b.log.read_text())
    assert pair.b.checkpoints(pair.app.name)[0]["where"] == ["partial", "remote"], "it came beside the layers"
    copy = pair.b.start(pair.app.name)
    assert copy["restored"], copy
    assert get(copy, "/version") == pair.answer
    pair.b.stop(pair.app.name)
    assert pair.b.deploy(pair.app.directory)["how"] == "reused"


def test_the_next_build_begins_from_the_same_layers(pair: Pair) -> None:
    """The stages below a changed file came along, so that it can be built without a base or an index."""
    (pair.app.directory / "more.txt").write_text("more")
    changed = pair.b.deploy(pair.app.directory)
    assert (changed["how"], changed["in_region"]) == ("built", True), changed
    assert _layers(pair.b, changed["build_id"])[:-1] == _layers(pair.a, pair.made["build_id"])[:-1]
    assert pair.a.deploy(pair.app.directory)["how"] == "adopted"


def test_what_is_removed_in_the_region_is_not_used_here(pair: Pair) -> None:
    """Both nodes have it whole; it is removed on one of them."""
    a, b, app = pair.a, pair.b, pair.app
    (app.directory / "more.txt").unlink(missing_ok=True)
    assert a.deploy(app.directory)["build_id"] == b.deploy(app.directory)["build_id"]
    (row,) = b.checkpoints(app.name)
    b.json("checkpoints", "pull", row["checkpoint_id"])
    copy = b.start(app.name)
    assert copy["restored"] and "store_bytes" not in copy["trace"], "it is here"
    b.stop(app.name)
    found = b.json("checkpoints", "inspect", row["checkpoint_id"])
    assert found["would_be_used"], found
    assert found["mappings"][0]["saved_bytes"] > 0 and found["region"]["stored_bytes"] > 0, found
    a.run("checkpoints", "rm", row["checkpoint_id"])
    explained = b.json("start", app.name, "--explain")
    assert not explained["would_restore"] and "is removed in the region" in explained["reason"], explained
    cold = b.start(app.name)
    assert not cold["restored"], cold
    answer = b.answer_of_post(cold["instance_id"])
    assert answer["status"] == "created", "the next one is made, and not the old one taken for it"
    until(lambda: b.checkpoints(app.name)[0]["where"] == ["local", "remote"], 60, b.log.read_text())
    b.stop(app.name)


def test_old_ones_go_by_count(pair: Pair) -> None:
    a, b, app = pair.a, pair.b, pair.app
    (app.directory / "main.py").write_text((app.directory / "main.py").read_text() + "\n")
    b.deploy(app.directory)
    newest = b.answer_of_post(b.start(app.name)["instance_id"])["checkpoint_id"]
    until(
        lambda: all(row["where"] == ["local", "remote"] for row in b.checkpoints(app.name)),
        60,
        b.log.read_text(),
    )
    assert len(a.checkpoints(app.name)) == 2
    a.kill_node(signal.SIGTERM)
    assert a.config is not None
    a.config.write_text(a.config.read_text().replace("[region]", "keep_checkpoints = 1\n[region]"))
    a.start_node()
    until(lambda: len(a.checkpoints(app.name)) == 1, 60, a.log.read_text())
    assert "is removed: adopted has 1 newer ones" in a.log.read_text()
    assert [row["checkpoint_id"] for row in a.checkpoints(app.name)] == [newest]
    b.stop(app.name)


def test_an_app_goes_with_what_the_region_has_of_it(pair: Pair) -> None:
    removed = pair.a.json("apps", "rm", pair.app.name)
    assert removed["removed"], removed
    objects = pair.a.state.parent / "localbucket" / "bucket" / "one"
    assert list(objects.glob("build/*/*/*/*")) == []
    assert not [
        path for path in objects.glob("checkpoint/*/*/*/manifest") if not path.with_name("removed").exists()
    ]
    assert pair.b.json("checkpoints", "gc")["dry_run"]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _small(bucket: Bucket, name: str) -> App:
    """An app on an image of one file, of which only the build matters here."""
    layout, bundle = bucket.root / "layout", bucket.root / "bundle"
    if not layout.exists():
        _run("umoci", "init", "--layout", layout)
        _run("umoci", "new", "--image", f"{layout}:base")
        _run("umoci", "unpack", "--image", f"{layout}:base", bundle)
        (bundle / "rootfs/etc").mkdir()
        (bundle / "rootfs/etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        _run("umoci", "repack", "--image", f"{layout}:base", bundle)
    app = App(bucket.root / name, name)
    (app.directory / "cerebrium.toml").write_text(
        f'[cerebrium.deployment]\nname = "{name}"\ndocker_base_image_url = "oci:{layout}:base"\n'
        '[cerebrium.runtime.custom]\nentrypoint = ["/cortex/serve"]\nport = 8000\n'
    )
    (app.directory / "serve").write_text("#!/no/shell\n")
    return app


def _run(*argv: str | Path) -> None:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _records(bucket: Bucket, prefix: str) -> list[Path]:
    return sorted(bucket.objects(prefix).glob("build/*/*/*/*"))


def test_made_anew(bucket: Bucket) -> None:
    app = _small(bucket, "anew")
    with bucket.node("a", "anew", bases=False) as a, bucket.node("b", "anew", bases=False) as b:
        first = a.deploy(app.directory)
        assert (first["how"], first["in_region"]) == ("built", True), first
        assert b.deploy(app.directory)["how"] == "adopted"
        anew = b.deploy(app.directory, "--fresh")
        assert (anew["how"], anew["in_region"]) == ("built", True), anew
        assert anew["build_id"] != first["build_id"]
        taken = a.deploy(app.directory)
        assert (taken["how"], taken["build_id"]) == ("adopted", anew["build_id"]), "the newer one counts"
        again = a.deploy(app.directory, "--fresh")
        assert again["build_id"] not in (first["build_id"], anew["build_id"])


def test_damaged_then_made_here(bucket: Bucket) -> None:
    app = _small(bucket, "bad")
    with bucket.node("a", "bad", bases=False) as a:
        made = a.deploy(app.directory)
        _flip(_records(bucket, "bad")[0])
        with bucket.node("b", "bad", bases=False) as b:
            alone = b.deploy(app.directory)
            assert (alone["how"], alone["in_region"]) == ("built", False), alone
            assert "refused" in alone["reason"] and "signature" in alone["reason"], alone
            said = b.run("deploy", str(app.directory), "-y")
            assert "! the region: it is refused: the signature" in said.stderr, said.stderr
            assert "(reused, not in the region)" in said.stdout
            assert len(_records(bucket, "bad")) == 1, "nothing beside what it refuses"
            anew = b.deploy(app.directory, "--fresh")
            assert (anew["how"], anew["in_region"]) == ("built", True), "asked for, it replaces it"
        assert a.deploy(app.directory)["build_id"] == anew["build_id"] != made["build_id"]

        (app.directory / "more.txt").write_text("more")
        a.deploy(app.directory)
        for layer in bucket.objects("bad").glob("layer/*/*/*"):
            _flip(layer)
        with bucket.node("c", "bad", bases=False) as c:
            alone = c.deploy(app.directory)
            assert alone["how"] == "built" and "refused" in alone["reason"], alone


def test_a_store_that_is_away(bucket: Bucket) -> None:
    """Made here; and published when the store is back."""
    app = _small(bucket, "away")
    with (
        servers.FaultProxy(bucket.endpoint) as proxy,
        bucket.node("a", "away", bases=False, endpoint=proxy.endpoint) as a,
        bucket.node("b", "away", bases=False) as b,
    ):
        proxy.fault = "outage"
        alone = a.deploy(app.directory)
        assert (alone["how"], alone["in_region"]) == ("built", False), alone
        assert "store" in alone["reason"], alone
        proxy.fault = ""
        until(lambda: "is published" in a.log.read_text(), 120, a.log.read_text())
        taken = b.deploy(app.directory)
        assert (taken["how"], taken["build_id"]) == ("adopted", alone["build_id"]), taken


def test_two_at_once(bucket: Bucket) -> None:
    app = _small(bucket, "raced")
    with bucket.node("a", "raced", bases=False) as a, bucket.node("b", "raced", bases=False) as b:
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda node: node.deploy(app.directory), (a, b)))
        assert {each["build_id"] for each in both} == {both[0]["build_id"]}
        assert sorted(each["how"] for each in both) == ["adopted", "built"], both
        assert all(each["in_region"] for each in both)
    assert len(_records(bucket, "raced")) == 1
