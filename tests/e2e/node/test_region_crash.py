"""`kill -9` of the node at each named step of upload, publication, collection and cache fill.

What the store itself holds at such a moment is tests/e2e/test_store_crash.py's. Here: the node that comes back goes
on by itself, what it shows is whole, nothing half made is left, and the next start works.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.node.regions import Region
from harness import MAIN, Failed, Relume, get, until
from relume.store import faults

pytestmark = pytest.mark.timeout(900)  # on a busy machine a node takes long to start, and these start many

DOOMED = Path(__file__).with_name("doomed_node.py")

UPLOAD = ("publish.manifest", "publish.begin", "publish.chunk", "publish.index", "publish.images")
LEARNED = ("working_set.part", "working_set.list")
COLLECTION = ("gc.manifest", "gc.object", "gc.chunk")
FETCH = ("fetch.unpacked", "fetch.entered", "fetch.chunk", "fetch.complete")
EVICTION = ("cache.evict",)


def _sampled(points: tuple[str, ...]) -> list[Any]:
    """The first of a group runs always: each starts a node three or four times, and the store's own matrix has all."""
    return [points[0], *(pytest.param(point, marks=pytest.mark.slow) for point in points[1:])]


def test_every_point_is_met_through_the_node() -> None:
    of_builds = {point for point in faults.POINTS if point.startswith(("layer.", "build."))}
    assert {*UPLOAD, *LEARNED, *COLLECTION, *FETCH, *EVICTION} == set(faults.POINTS) - of_builds


@pytest.fixture(scope="module")
def maker(region: Region) -> Iterator[Relume]:
    """A node with a store of its own, where each test begins and ends without a checkpoint."""
    with region.node("crash", prefix="crash") as node:
        yield node


@contextlib.contextmanager
def doomed(node: Relume, point: str, nth: int = 1) -> Iterator[list[str]]:
    """The node is killed at ``point`` in the block, or soon after; then it runs again as any other.

    What the block puts into the list is shown where the node did not come to ``point``.
    """
    words: list[str] = []
    node.kill_node(signal.SIGTERM)
    node.program = [sys.executable, str(DOOMED), point, str(nth)]
    node.start_node()
    yield words
    until(
        lambda: node.process is not None and node.process.poll() is not None,
        120,
        f"{point} was not reached: {words}\n{node.log.read_text()[-3000:]}",
    )
    assert node.process is not None and node.process.returncode == -signal.SIGKILL
    node.program = MAIN
    node.start_node()


def published(node: Relume, region: Region) -> str:
    """Wait until the node's checkpoint is in the store; its id. Every object of it must be right."""
    until(
        lambda: [row for row in node.checkpoints(region.app.name) if row["where"] == ["local", "remote"]],
        60,
        node.log.read_text(),
    )
    (row,) = node.checkpoints(region.app.name)
    verdict = node.json("checkpoints", "verify", row["checkpoint_id"])
    assert verdict["ok"], verdict
    return str(row["checkpoint_id"])


def restored(node: Relume, region: Region) -> None:
    """The next start works, from the checkpoint."""
    node.stop(region.app.name)
    copy = node.start(region.app.name)
    assert copy["restored"], copy
    assert get(copy, "/sum")["sum"] == region.answer["sum"]
    nothing_half_made(node)


def nothing_half_made(node: Relume) -> None:
    assert not list((node.state / "region" / "cache").glob(".*"))


def forget(node: Relume, region: Region) -> None:
    node.stop(region.app.name)
    for row in node.checkpoints(region.app.name):
        node.run("checkpoints", "rm", row["checkpoint_id"])
    assert node.checkpoints(region.app.name) == []


def working_sets(region: Region) -> int:
    return len(list(region.objects("crash").glob("working-set/*/*/*/*/list")))


@pytest.mark.parametrize("point", _sampled(UPLOAD))
def test_killed_in_an_upload(maker: Relume, region: Region, point: str) -> None:
    with doomed(maker, point, 5 if point == "publish.chunk" else 1):
        maker.run("start", region.app.name, check=False)  # the node may be gone before it answers
    published(maker, region)
    restored(maker, region)
    forget(maker, region)


@pytest.mark.parametrize("point", _sampled(LEARNED))
def test_killed_while_it_publishes_what_it_learned(maker: Relume, region: Region, point: str) -> None:
    maker.start(region.app.name)
    published(maker, region)
    before = working_sets(region)
    maker.stop(region.app.name)
    with doomed(maker, point), contextlib.suppress(Failed, OSError):  # the node may be gone before it answers
        get(maker.start(region.app.name), "/sum")  # the first answer ends what is learned
    published(maker, region)
    restored(maker, region)
    until(lambda: working_sets(region) > before, 30, maker.log.read_text())
    forget(maker, region)


@pytest.mark.parametrize("point", _sampled(COLLECTION))
def test_killed_in_a_collection(maker: Relume, region: Region, point: str) -> None:
    maker.start(region.app.name)
    published(maker, region)
    before = working_sets(region)
    restored(maker, region)
    until(lambda: working_sets(region) > before, 30, maker.log.read_text())
    forget(maker, region)
    time.sleep(1.1)  # the server's time stamps are whole seconds
    with doomed(maker, point, 2 if point == "gc.chunk" else 1) as words:
        words.append(str(maker.run("checkpoints", "gc", "--delete", "-o", "json", check=False)))
    started = maker.start(region.app.name)
    assert not started["restored"], started
    published(maker, region)
    restored(maker, region)
    forget(maker, region)


@pytest.mark.slow
@pytest.mark.parametrize("point", FETCH)
def test_killed_while_its_cache_fills(region: Region, point: str) -> None:
    with region.node("filling") as node:
        with doomed(node, point):  # the first chunk is that of the held files: the pager fetches most others
            node.run("start", region.app.name, check=False)
        assert node.json("checkpoints", "verify", region.checkpoint_id)["ok"]
        restored(node, region)
        until(
            lambda: [row for row in node.checkpoints(region.app.name) if "local" in row["where"]],
            60,
            node.log.read_text(),
        )
        restored(node, region)


@pytest.mark.parametrize("point", EVICTION)
def test_killed_while_it_evicts(region: Region, point: str) -> None:
    shutil.copytree(region.objects(), region.objects("evicting"))
    with region.node("evicting", prefix="evicting") as node:
        node.json("checkpoints", "pull", region.checkpoint_id)
        with doomed(node, point):
            node.run("checkpoints", "rm", region.checkpoint_id, check=False)
        nothing_half_made(node)
        started = node.start(region.app.name)
        assert not started["restored"], started
        published(node, region)
        restored(node, region)
