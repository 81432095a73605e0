"""Many nodes that start one build at the same moment: first from nothing, then from the one checkpoint.

Each is a process with a state and a network of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from relume.cli.benchmark import measure
from relume.cli.benchmark.bucket import road_behind
from relume.cli.benchmark.measure import Say, Target
from relume.cli.benchmark.network import network
from relume.cli.benchmark.own_node import OwnNode
from relume.cli.benchmark.region import Place, Row, read_before_the_answer, until
from relume.cli.benchmark.workloads import Workload

_BUCKET_PORT = 9000
"""In every node's network."""


def measure_crowd(place: Place, workload: Workload, count: int, say: Say) -> Row:
    """``count`` nodes start one build at once: first from nothing, then, all new again, from the one checkpoint."""
    app = f"bench-{workload.name}"
    with contextlib.ExitStack() as stack:
        say(f"{workload.name}: {count} nodes at once, no checkpoint anywhere")
        nodes = _deployed(stack, place, workload, app, count)
        began = _all(nodes, lambda node: node.start(app))
        answers = _all(nodes, lambda node: node.ask(workload.answer, _url(node, app)))
        expected = answers[0]
        until(nodes[0], lambda: place.manifests() > 0)
        made = [
            row for node in nodes for row in node.client.get("/v1/checkpoints") if "local" in row["where"]
        ]
        maker = next(node for node in nodes if node.checkpoint_of(app) and _has_local(node))
        for node in nodes:
            node.stop(app)
        facts = maker.checkpoint_of(app)
        assert facts is not None
        images = maker.images(facts["checkpoint_id"])
        target = Target(workload, app, expected, 0.0, facts, images, 0.0)
        say(f"{workload.name}: learning")
        measure.learn(maker, target)
        until(maker, lambda: bool(place.objects("working-set/*/*/*/*/list")))
    cold = sum(not started["restored"] for started in began)
    with contextlib.ExitStack() as stack:
        say(f"{workload.name}: {count} nodes at once, which have never seen it")
        nodes = _deployed(stack, place, workload, app, count)
        since = time.monotonic()

        def one(node: OwnNode) -> tuple[float, Any, dict[str, Any]]:
            started = node.start(app)
            answer = node.ask(workload.answer, str(started["url"]))
            return time.monotonic() - since, answer, started

        arrived = _all(nodes, one)
        read = [
            read_before_the_answer(node, str(started["instance_id"]))["store_bytes"]
            for node, (_, _, started) in zip(nodes, arrived, strict=True)
        ]
    needed = place.working_set_bytes()
    return {
        "row": "crowd",
        "workload": workload.name,
        "nodes": count,
        "booted_cold": cold,
        "checkpoints_made": len(made),
        "manifests": place.manifests(),
        "wrong_answers": sum(
            answer != expected for answer in [*answers, *(answer for _, answer, _ in arrived)]
        ),
        "restored": sum(bool(started["restored"]) for _, _, started in arrived),
        "seconds": round(max(seconds for seconds, _, _ in arrived), 3),
        "store_bytes": sum(read),
        "working_set_stored_bytes": needed,
        "bytes_ratio": round(sum(read) / (count * needed), 2),
    }


def _deployed(
    stack: contextlib.ExitStack, place: Place, workload: Workload, app: str, count: int
) -> list[OwnNode]:
    nodes = []
    for number in range(count):
        own = stack.enter_context(network())
        listening = stack.enter_context(own.listener(_BUCKET_PORT))
        log = place.key.with_name(f"road-{number}.log")
        stack.enter_context(road_behind(listening, place.bucket, log))
        nodes.append(stack.enter_context(place.node(f"http://127.0.0.1:{_BUCKET_PORT}", own)))
    for node in nodes:
        node.deploy(workload.directory, app)
    for node in nodes:
        node.settle()
    return nodes


def _all(nodes: Sequence[OwnNode], work: Callable[[OwnNode], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(nodes)) as pool:
        return list(pool.map(work, nodes))


def _url(node: OwnNode, app: str) -> str:
    (url,) = [row["url"] for row in node.instances() if row["app"] == app and row["state"] == "ready"]
    return str(url)


def _has_local(node: OwnNode) -> bool:
    return any("local" in row["where"] for row in node.client.get("/v1/checkpoints"))
