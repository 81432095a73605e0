"""A store that fails: a proxy between node and bucket does to every third request what networks and servers do.

During an upload, while a checkpoint is looked for, and while pages come. What can be ridden out is; what cannot ends
within a bound, with a reason and a cold boot. Nothing is lost, and nothing half done is visible.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import store_servers as servers
from e2e.node.regions import Region
from harness import Relume, get, until

pytestmark = pytest.mark.timeout(900)  # on a busy machine; seconds on one at rest


def also_slow(*faults: str) -> list[Any]:
    """Half a minute each, and much alike: with `script/test --all`."""
    return [pytest.param(fault, marks=pytest.mark.slow) for fault in faults]


SENDING = ["503", "lost-answer", *also_slow("latency", "500", "reset-request")]
READING = ["reset", "truncate", *also_slow("latency", "500", "503", "slow")]

Faulty = tuple[servers.FaultProxy, Relume]


@pytest.fixture(scope="module")
def sender(region: Region) -> Iterator[Faulty]:
    with (
        servers.FaultProxy(region.endpoint) as proxy,
        region.node("sender", prefix="storms", endpoint=proxy.endpoint) as node,
    ):
        yield proxy, node


@pytest.fixture(scope="module")
def reader(region: Region) -> Iterator[Faulty]:
    with (
        servers.FaultProxy(region.endpoint) as proxy,
        region.node("reader", endpoint=proxy.endpoint, fault_wait_s=60.0, start_wait_s=60.0) as node,
    ):
        yield proxy, node


def published(node: Relume, region: Region) -> str:
    until(
        lambda: [row for row in node.checkpoints(region.app.name) if row["where"] == ["local", "remote"]],
        120,
        node.log.read_text(),
    )
    (row,) = node.checkpoints(region.app.name)
    return str(row["checkpoint_id"])


def hold_back_memory(proxy: servers.FaultProxy, region: Region, seconds: float) -> None:
    """The working set comes as ever, and an answer with it; each chunk of the rest takes so long."""
    pages = region.chunks_of_pages()
    proxy.only = lambda path: path.rpartition("/")[2] in pages
    proxy.fault, proxy.every, proxy.latency_s = "latency", 1, seconds


def nothing_comes(proxy: servers.FaultProxy) -> None:
    proxy.only = lambda _: True
    proxy.fault = "outage"


def ready(node: Relume, region: Region, *, restored: bool) -> list[dict[str, Any]]:
    return [
        row
        for row in node.ps(region.app.name)
        if row["state"] == "ready" and bool(row["restored"]) == restored
    ]


@pytest.mark.slow  # five minutes; before the starts below, after which nodes may have learned all of the memory
@pytest.mark.parametrize("seconds", [5, 60])
def test_the_store_is_gone_for_a_while(region: Region, seconds: int) -> None:
    """One node uploads, one has an instance whose memory is still to come, one starts: at the same moment."""
    prefix = f"gone-{seconds}"
    with (
        servers.FaultProxy(region.endpoint) as sending,
        servers.FaultProxy(region.endpoint) as reading,
        region.node(f"uploads-{seconds}", prefix=prefix, endpoint=sending.endpoint) as uploads,
        region.node(f"pages-{seconds}", endpoint=reading.endpoint, fault_wait_s=seconds + 60.0) as pages,
        region.node(f"starts-{seconds}", endpoint=reading.endpoint, start_wait_s=2.0) as starts,
        ThreadPoolExecutor(1) as pool,
    ):
        hold_back_memory(reading, region, 25.0)
        sending.only = lambda path: "/chunk/" in path
        sending.fault, sending.every, sending.latency_s = "latency", 1, 25.0
        cold = uploads.start(region.app.name)
        made = uploads.answer_of_post(cold["instance_id"])
        assert made["status"] == "created"
        copy = pages.start(region.app.name)
        assert copy["restored"], copy
        # What is needed up to the first answer is learned for all: were it all memory, the next start had all at once.
        assert get(copy, "/sum") == region.answer
        nothing_comes(sending)
        nothing_comes(reading)
        gone_at = time.monotonic()
        waiting = pool.submit(get, copy, "/all", seconds + 120.0)
        started = starts.start(region.app.name)
        assert not started["restored"], started
        assert "the region's store" in started["reason"], started
        assert get(started, "/sum")["sum"] == region.answer["sum"]
        time.sleep(max(0.0, gone_at + seconds - time.monotonic()))
        assert not waiting.done(), "the outage came too late: all memory was there"
        assert not list(region.objects(prefix).rglob("manifest")), (
            "it came too late, or half an upload is visible"
        )
        sending.fault = reading.fault = ""
        assert waiting.result()["sum"] == get(started, "/all", 120)["sum"]
        assert [row["instance_id"] for row in ready(pages, region, restored=True)] == [copy["instance_id"]]
        checkpoint_id = published(uploads, region)
        assert checkpoint_id == made["checkpoint_id"]
        assert uploads.json("checkpoints", "verify", checkpoint_id)["ok"]


@pytest.mark.slow  # a store that is waited for: 90 s
def test_memory_that_does_not_come_in_time(region: Region) -> None:
    """The fault is held as long as node.toml says; then the instance ends, and another takes its place."""
    with (
        servers.FaultProxy(region.endpoint) as proxy,
        region.node("impatient", endpoint=proxy.endpoint, fault_wait_s=10.0, start_wait_s=10.0) as node,
    ):
        hold_back_memory(proxy, region, 5.0)
        copy = node.start(region.app.name)
        assert copy["restored"], copy
        nothing_comes(proxy)
        (cold,) = until(lambda: ready(node, region, restored=False), 120, node.log.read_text())
        assert get(cold, "/sum")["sum"] == region.answer["sum"]
        assert not ready(node, region, restored=True)
        assert "did not come" in node.log.read_text()
        proxy.fault = ""


@pytest.mark.parametrize("fault", SENDING)
def test_an_upload_through(sender: Faulty, region: Region, fault: str) -> None:
    proxy, node = sender
    proxy.fault, proxy.hits = fault, 0
    started = node.start(region.app.name)
    assert node.answer_of_post(started["instance_id"])["status"] == "created"
    checkpoint_id = published(node, region)
    assert proxy.hits > 5
    proxy.fault = ""
    verdict = node.json("checkpoints", "verify", checkpoint_id)
    assert verdict["ok"], verdict
    node.stop(region.app.name)
    node.run("checkpoints", "rm", checkpoint_id)


@pytest.mark.parametrize("fault", READING)
def test_a_start_through(reader: Faulty, region: Region, fault: str) -> None:
    """Finding, fetching and paging; then the rest, until the node needs the store no more."""
    proxy, node = reader
    node.stop(region.app.name)
    node.kill_node(signal.SIGTERM)
    shutil.rmtree(node.state / "region" / "cache")
    node.start_node()
    proxy.fault, proxy.hits = fault, 0
    started = node.start(region.app.name)
    assert started["restored"], started
    assert get(started, "/sum") == region.answer
    right = get(started, "/all")
    until(
        lambda: node.checkpoints(region.app.name)[0]["where"] == ["local", "remote"],
        120,
        node.log.read_text(),
    )
    assert proxy.hits > 5
    proxy.fault = ""
    node.stop(region.app.name)
    local = node.start(region.app.name)
    assert local["restored"] and "store_bytes" not in local["trace"], local
    assert get(local, "/all") == right
