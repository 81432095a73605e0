"""`relume bench --region`: nodes that share a bucket, measured against what would be done without relume.

One node makes a checkpoint and learns. Then, in rounds whose parts are interleaved: its own start with the page
cache dropped; a start on a node that has never seen the checkpoint; and the same by downloading all of it first and
restoring eagerly. Every node is new: a process, a state and a cache of its own.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relume.cli.benchmark import measure, page_cache
from relume.cli.benchmark.bucket import CREDENTIALS, Bucket, bucket, narrow_road
from relume.cli.benchmark.measure import Say, Target
from relume.cli.benchmark.network import Network
from relume.cli.benchmark.own_node import CACHE, OwnNode, own_node
from relume.cli.benchmark.workloads import Workload
from relume.errors import StartFailed
from relume.store import new_key_file

LIMITED = 200_000_000
"""Bytes per second of the narrow road."""

_PATIENCE = 300.0
_SIGNS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
_GOALS = {
    "upload": [("speed_ratio", ">=", 0.7)],
    "download": [("speed_ratio", ">=", 0.7)],
    "first-answer": [
        ("to_local", "<=", 2.0),
        ("sooner_than_download", ">=", 2.0),
        ("bytes_ratio", "<=", 1.3),
    ],
    "first-answer, limited": [("sooner_than_download", ">=", 3.0), ("bytes_ratio", "<=", 1.3)],
    "crowd": [("wrong_answers", "==", 0), ("checkpoints_made", "==", 1), ("bytes_ratio", "<=", 1.2)],
}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where nodes meet: a prefix of a bucket, and the key file they share."""

    bucket: Bucket
    prefix: str
    key: Path

    @contextlib.contextmanager
    def node(self, endpoint: str | None = None, network: Network | None = None) -> Iterator[OwnNode]:
        """A new node of this region, in ``network``, which reaches the bucket through ``endpoint``."""
        settings = {
            "store": {"url": self.bucket.url(self.prefix, endpoint)},
            "region": {"key_file": str(self.key)},
        }
        lines = [
            line
            for table, values in settings.items()
            for line in (f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()))
        ]
        with own_node("\n".join(lines) + "\n", CREDENTIALS, network) as node:
            yield node

    def objects(self, pattern: str) -> list[Path]:
        return [path for path in (self.bucket.objects / self.prefix).glob(pattern) if path.is_file()]

    def working_set_bytes(self) -> int:
        """Stored bytes of the newest working set of the one checkpoint."""
        newest = max(self.objects("working-set/*/*/*/*/list"), key=lambda path: int(path.parent.name)).parent
        return sum(path.stat().st_size for path in newest.iterdir() if path.name.isdecimal())

    def manifests(self) -> int:
        return len(self.objects("checkpoint/*/*/*/manifest"))


@dataclass(slots=True)
class Link:
    """One way to the bucket, and what was measured over it."""

    name: str
    endpoint: str | None
    remote: list[float] = field(default_factory=list)
    download: list[float] = field(default_factory=list)
    traces: list[dict[str, float]] = field(default_factory=list)
    store_bytes: list[int] = field(default_factory=list)
    store_requests: list[int] = field(default_factory=list)


def run(workload: Workload, crowd_of: Workload, nodes: int, runs: int, say: Say) -> Iterator[Row]:
    """All rows of the region: transfers and first answers with ``workload``, then many nodes with ``crowd_of``.

    Raises HostError, and what a start raises.
    """
    from relume.cli.benchmark import crowd, transfer

    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.update(CREDENTIALS)  # the transfers are made by this process
    with tempfile.TemporaryDirectory(prefix="region-", dir=CACHE) as scratch:
        root = Path(scratch)
        key = root / "region.key"
        new_key_file(key)
        with bucket(root / "bucket") as store, narrow_road(store, LIMITED, root / "road.log") as narrow:
            place = Place(store, "region", key)
            with place.node() as maker:
                target = make(maker, place, workload, say)
                transfers = transfer.measure(store, key, target.images, root, runs, say)
                yield from map(judged, transfers.rows(workload.name))
                links = [Link("loopback", None), Link(f"{LIMITED / 1e6:.0f} MB/s", narrow)]
                yield from map(judged, first_answers(maker, place, target, links, runs, say))
            shutil.rmtree(store.objects / place.prefix)
            yield judged(crowd.measure_crowd(Place(store, "crowd", key), crowd_of, nodes, say))


def judged(row: Row) -> Row:
    """The row with the goals of its kind, each with whether it was met."""
    goals = [
        {"ratio": name, "goal": f"{sign} {limit:g}", "met": _SIGNS[sign](row[name], limit)}
        for name, sign, limit in _GOALS[row["row"]]
    ]
    return row | {"goals": goals}


def make(node: OwnNode, place: Place, workload: Workload, say: Say) -> Target:
    """Deploy, checkpoint, upload, learn, publish what was learned."""
    target = measure.deploy(node, workload, say)
    say(f"{workload.name}: until it is uploaded")
    until(node, lambda: place.manifests() > 0)
    say(f"{workload.name}: learning")
    measure.learn(node, target)
    until(node, lambda: bool(place.objects("working-set/*/*/*/*/list")))
    time.sleep(1.0)  # a second one, where the second run learned more
    until(
        node,
        lambda: len(place.objects("working-set/*/*/*/*/0")) == len(place.objects("working-set/*/*/*/*/list")),
    )
    return target


def first_answers(
    maker: OwnNode, place: Place, target: Target, links: Sequence[Link], runs: int, say: Say
) -> list[Row]:
    """A strange node's first answer, for each link, beside the maker's own and beside download and eager restore."""
    local: list[float] = []
    for run in range(runs):
        say(f"{target.workload.name}: first answers, round {run + 1} of {runs}")
        maker.settle()
        page_cache.drop(target.images)
        seconds, started = measure.start(maker, target, "learned")
        local.append(seconds)
        maker.stop(str(started["instance_id"]))
        for link in links:
            with _stranger(place, link, target) as node:
                _remote(node, target, link)
            with _stranger(place, link, target) as node:
                link.download.append(_download_and_restore(node, target))
    needed = place.working_set_bytes()
    return [_first_answer_row(target, link, local, needed) for link in links]


@contextlib.contextmanager
def _stranger(place: Place, link: Link, target: Target) -> Iterator[OwnNode]:
    """A node that has the build and nothing of the checkpoint; nothing is in the page cache but the store's files."""
    with place.node(link.endpoint) as node:
        node.deploy(target.workload.directory, target.app)
        node.settle()
        page_cache.drop(target.images)
        place.bucket.warm(place.prefix)
        yield node


def _remote(node: OwnNode, target: Target, link: Link) -> None:
    seconds, started = measure.start(node, target, "learned")
    link.remote.append(seconds)
    link.traces.append(started["trace"])
    read = read_before_the_answer(node, str(started["instance_id"]))
    link.store_bytes.append(read["store_bytes"])
    link.store_requests.append(read["store_requests"])


def read_before_the_answer(node: OwnNode, instance_id: str) -> dict[str, int]:
    (row,) = [row for row in node.instances() if row["instance_id"] == instance_id]
    return {name: int(row[name]) for name in ("store_bytes", "store_requests")}


def _download_and_restore(node: OwnNode, target: Target) -> float:
    began = time.monotonic()
    node.client.post(f"/v1/checkpoints/{target.facts['checkpoint_id']}/pull")
    measure.start(node, target, "criu-eager")
    return time.monotonic() - began


def _first_answer_row(target: Target, link: Link, local: list[float], needed: int) -> Row:
    remote, download, own = map(statistics.median, (link.remote, link.download, local))
    names = [name for name in link.traces[0] if all(name in trace for trace in link.traces)]
    stages = {name: round(statistics.median(trace[name] for trace in link.traces), 4) for name in names}
    return {
        "row": "first-answer" if link.endpoint is None else "first-answer, limited",
        "workload": target.workload.name,
        "link": link.name,
        "seconds": round(remote, 3),
        "spread": [round(min(link.remote), 3), round(max(link.remote), 3)],
        "local_dropped_s": round(own, 3),
        "to_local": round(remote / own, 2),
        "download_eager_s": round(download, 3),
        "sooner_than_download": round(download / remote, 2),
        "store_bytes": round(statistics.median(link.store_bytes)),
        "store_requests": round(statistics.median(link.store_requests)),
        "working_set_stored_bytes": needed,
        "bytes_ratio": round(statistics.median(link.store_bytes) / needed, 2),
        "image_bytes": target.image_bytes,
        "touched_bytes": target.touched_bytes(),
        "stages": dict(sorted(stages.items(), key=lambda item: item[1])),
        "runs": len(link.remote),
    }


def until(node: OwnNode, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise StartFailed("the region did not come to be in time", hint=node.last_words(5))
        time.sleep(0.1)
