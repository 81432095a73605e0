"""A build is made once in a region: other nodes adopt it with its layers, and say so; or why they did not."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e import store_servers as servers
from harness import SNIPPET, App, Relume, get, share_builds, until
from relume.store import new_key_file

pytestmark = pytest.mark.timeout(900)  # the first one sends a whole base twice

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
        state = self.root / f"{prefix}-{name}"
        state.mkdir(mode=0o700)
        if bases:
            share_builds(self.bases, state)
        config = state.with_suffix(".toml")
        config.write_text(
            f'[store]\nurl = "{servers.url(endpoint or self.endpoint, prefix=prefix)}"\n'
            f'[region]\nkey_file = "{self.key}"\n'
        )
        env = {"AWS_ACCESS_KEY_ID": servers.USER, "AWS_SECRET_ACCESS_KEY": servers.PASSWORD}
        env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels if pip else self.root)}
        node = Relume(state, config=config, env=env)
        node.start_node()
        try:
            yield node
        finally:
            node.close()
            shutil.rmtree(state, ignore_errors=True)
        assert "Traceback" not in node.log.read_text(), node.log.read_text()[-8000:]


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


def test_adopted_and_restored(bucket: Bucket) -> None:
    """The second node has no base, and no package index that it could build from: everything comes from the store."""
    app = App(bucket.root / "app", "adopted").write(PROGRAM, ready="/version", extra=PIP)
    with bucket.node("a", "one") as a, bucket.node("b", "one", bases=False, pip=False) as b:
        made = a.deploy(app.directory)
        assert (made["how"], made["in_region"], made["reason"]) == ("built", True, None), made
        original = a.start(app.name)
        assert a.answer_of_post(original["instance_id"])["status"] == "created"
        until(lambda: a.checkpoints(app.name)[0]["where"] == ["local", "remote"], 60, a.log.read_text())

        deployed = b.run("deploy", str(app.directory), "-y")
        assert "adopted from the region" in deployed.stderr, deployed.stderr
        assert "pip: installing" not in deployed.stderr and "base:" not in deployed.stderr, deployed.stderr
        assert f"build {made['build_id']} (adopted)" in deployed.stdout
        assert _layers(b, made["build_id"]) == _layers(a, made["build_id"])
        copy = b.start(app.name)
        assert copy["restored"], copy
        assert get(copy, "/version") == get(original, "/version")
        assert b.deploy(app.directory)["how"] == a.deploy(app.directory)["how"] == "reused"

        # A change of one file: the stages below it came along, so that this node builds without an index too.
        (app.directory / "more.txt").write_text("more")
        changed = b.deploy(app.directory)
        assert (changed["how"], changed["in_region"]) == ("built", True), changed
        assert _layers(b, changed["build_id"])[:-1] == _layers(a, made["build_id"])[:-1]
        assert a.deploy(app.directory)["how"] == "adopted"


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
