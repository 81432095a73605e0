"""A region for tests: a bucket with one checkpoint and its working set, and nodes that share it.

All run on this machine with state directories of their own. Each new node deploys the same directory (so it has
the same build) and has none of the first one's checkpoints. localbucket keeps objects as files, so that they can be
damaged behind the nodes' backs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import store_servers as servers
from harness import SNIPPET, App, Relume, get, share_builds, until
from relume.store import Region as Store
from relume.store import RegionConfig, new_key_file

CREDENTIALS = {"AWS_ACCESS_KEY_ID": servers.USER, "AWS_SECRET_ACCESS_KEY": servers.PASSWORD}

#: 48 MiB that don't compress, of which an answer needs 4, and an open file. QUIET ones ask for no checkpoint.
PROGRAM = f"""
import random
HELD = open("held", "w+")
HELD.write("held " * 20000)
HELD.flush()
WEIGHTS = random.Random(7).randbytes(48 << 20)
ACTIONS["sum"] = lambda _: {{"sum": sum(WEIGHTS[: 4 << 20 : 512]), "boot": STATE["boot"]}}
ACTIONS["all"] = lambda _: {{"sum": sum(WEIGHTS[::512])}}
if "QUIET" not in os.environ:
    exec({SNIPPET!r})
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

    def chunks_of_pages(self) -> list[str]:
        """The ids of the chunks that hold memory, in the order of its addresses; the others hold files."""
        settings = RegionConfig(servers.url(self.endpoint), self.key)
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=self.root) as state:
            for name, value in CREDENTIALS.items():
                patch.setenv(name, value)
            store = Store(settings, Path(state), "observer")
            (name,) = store.names()
            fetched = store.fetch(name)
            streams = [file.stream for file in fetched.pages._files.values()]
            fetched.close()
        return [ref.id.hex() for stream in streams for ref in stream.chunks]

    @contextlib.contextmanager
    def node(
        self, name: str, *, prefix: str = "region", key: bool = True, endpoint: str = "", **settings: Any
    ) -> Iterator[Relume]:
        """Another node of the region, which has the build with its layers: nothing of it is to be fetched."""
        with node_of(
            self.root,
            name,
            servers.url(endpoint or self.endpoint, prefix=prefix),
            self.key if key else None,
            self.first,
            **settings,
        ) as node:
            node.deploy(self.app.directory)
            yield node


@contextlib.contextmanager
def node_of(
    root: Path,
    name: str,
    url: str,
    key: Path | None,
    builds: Relume | None,
    env: Mapping[str, str] | None = None,
    **settings: Any,
) -> Iterator[Relume]:
    """A node with its state in ``root``; it has the bases and builds of ``builds``, if that is one."""
    state = root / name
    state.mkdir(mode=0o700)
    if builds is not None:
        share_builds(builds, state)
    settings |= {"key_file": str(key)} if key else {}
    lines = ["[store]", f'url = "{url}"', "[region]"]
    lines += [f"{option} = {json.dumps(value)}" for option, value in settings.items()]
    config = root / f"{name}.toml"
    config.write_text("\n".join(lines) + "\n")
    node = Relume(state, config=config, env={**CREDENTIALS, **(env or {})})
    node.start_node()
    try:
        yield node
    finally:
        node.close()
        shutil.rmtree(state, ignore_errors=True)
    assert "Traceback" not in node.log.read_text(), node.log.read_text()[-8000:]


@contextlib.contextmanager
def made(workplace: Path, relume: Relume) -> Iterator[Region]:
    """The region, with the node that made its checkpoint and learned."""
    root = workplace / "region"
    root.mkdir(mode=0o700)
    key = root / "region.key"
    new_key_file(key)
    app = App(root / "app", "travels").write(PROGRAM, ready="/sum")
    with (
        servers.localbucket(root) as endpoint,
        node_of(root, "first", servers.url(endpoint), key, relume) as first,
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
