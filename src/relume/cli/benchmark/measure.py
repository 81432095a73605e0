"""What is measured: the time from before the start request to the first right answer over HTTP.

All ways of one workload are measured in one run, interleaved, their order turning from round to round, so that
whatever else the machine does falls on all of them. Before the first round each checkpoint's pages are verified
against their hashes by one restore that is not counted (relume does that once per boot of the machine); its time
is in every row as ``verifying_restore_s``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relume.cli.benchmark import page_cache
from relume.cli.benchmark.own_node import OwnNode
from relume.cli.benchmark.page_cache import WriteLimits
from relume.cli.benchmark.workloads import Workload
from relume.errors import CallFailed, StartFailed
from relume.pager import working_set

WAYS: dict[str, dict[str, Any]] = {
    "cold": {"restore": False},
    "criu-eager": {"memory": "eager"},
    "criu-lazy": {"memory": "criu"},
    "first": {"memory": "unlearned"},
    "learned": {"memory": "paged"},
    "prepared": {"memory": "paged"},
}
"""Way -> what the start request says. Every way but "cold" restores.

"prepared" is asked for like "learned", of a variant of the app that says ``prepared = 1``.
"""

PREPARED_POLICY = {"prepared": 1, "prepared_max_age_s": 86400}

CACHES = ("warm", "dropped")

_LEARNING_RUNS = 2
_CHECKPOINT_PATIENCE = 300.0
_RECORD_PATIENCE = 15.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A deployed workload with a checkpoint whose pages are verified: what is started, over and over.

    ``expected`` is the right answer, ``answer_s`` what it takes the warm original, ``facts`` what
    `checkpoints inspect` says.
    """

    workload: Workload
    app: str
    expected: Any
    answer_s: float
    facts: dict[str, Any]
    images: Path
    verifying_restore_s: float

    @property
    def image_bytes(self) -> int:
        return int(self.facts["size_bytes"])

    @property
    def working_set(self) -> Path:
        return self.images.parent / "working-set"

    def touched_bytes(self) -> int | None:
        """What was learned to be needed for the first answer; None before anything was."""
        sizes = {
            int(path.stem.removeprefix("pages-")): path.stat().st_size
            for path in self.images.glob("pages-*.img")
        }
        learned, _ = working_set.load(self.working_set, sizes)
        return learned.total if learned else None


@dataclass(slots=True)
class Series:
    """The measured starts of one (way, cache)."""

    target: Target
    way: str
    cache: str
    seconds: list[float] = field(default_factory=list)
    traces: list[dict[str, float]] = field(default_factory=list)
    memory: str = ""

    def stages(self) -> dict[str, float]:
        """Median seconds since the start at which each stage was over, for stages that every start had."""
        names = [name for name in self.traces[0] if all(name in trace for trace in self.traces)]
        found = {name: statistics.median(trace[name] for trace in self.traces) for name in names}
        return {name: round(at, 4) for name, at in sorted(found.items(), key=lambda item: item[1])}

    def row(self, disk: float | None, limits: WriteLimits) -> dict[str, Any]:
        """As JSON. ``disk`` is the measured bytes per second, where anything was dropped."""
        timings = self.target.facts["timings"]
        return {
            "workload": self.target.workload.name,
            "way": self.way,
            "cache": self.cache,
            "first_answer_s": round(statistics.median(self.seconds), 4),
            "runs": len(self.seconds),
            "spread": [round(min(self.seconds), 4), round(max(self.seconds), 4)],
            "image_bytes": self.target.image_bytes,
            "touched_bytes": self.target.touched_bytes(),
            "frozen_s": round(timings["frozen_s"], 4),
            "answer_s": round(self.target.answer_s, 5),
            "memory": self.memory,
            "hashed": False,  # all pages were verified before the first round
            "verifying_restore_s": round(self.target.verifying_restore_s, 4),
            "own_s": own_share(self.stages()),
            "stages": self.stages(),
            "freeze": {name: round(seconds, 4) for name, seconds in timings.items()},
            "freeze_limits": {
                "memory_bytes_per_s": round(limits.memory),
                "disk_bytes_per_s": round(limits.disk),
            },
            **({"disk_bytes_per_s": round(disk)} if disk and self.cache == "dropped" else {}),
        }


def deploy(
    node: OwnNode,
    workload: Workload,
    say: Say,
    *,
    variant: str = "",
    policy: Mapping[str, object] | None = None,
) -> Target:
    """Deploy, boot once with a checkpoint, restore once with its pages verified.

    ``policy`` is added as the app's ``[relume.checkpoint]``; the app is then named by ``variant`` too.
    """
    app = f"bench-{workload.name}{variant}"
    say(f"{workload.name}{variant}: deploying")
    node.deploy(workload.directory, app, _config(node, workload, app, policy) if policy else None)
    say(f"{workload.name}{variant}: booting it for its checkpoint")
    node.settle()
    original = node.start(app, restore=False)
    facts = _await_checkpoint(node, app, original["instance_id"])
    expected = node.ask(workload.answer, original["url"])
    answer_s = statistics.median(_timed(lambda: node.ask(workload.answer, original["url"])) for _ in range(7))
    node.stop(app)
    node.settle()
    images = node.images(facts["checkpoint_id"])
    page_cache.warm(images)
    target = Target(workload, app, expected, answer_s, facts, images, 0.0)
    seconds, _ = start(node, target, "criu-eager")
    node.stop(app)
    return replace(target, verifying_restore_s=seconds)


def _config(node: OwnNode, workload: Workload, app: str, policy: Mapping[str, object]) -> Path:
    """The workload's cerebrium.toml with a [relume.checkpoint] of numbers and strings."""
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in policy.items())
    path = node.state / f"{app}.toml"
    own = (workload.directory / "cerebrium.toml").read_text()
    path.write_text(f"{own}\n[relume.checkpoint]\n{table}")
    return path


def _await_checkpoint(node: OwnNode, app: str, instance_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + _CHECKPOINT_PATIENCE
    while (facts := node.checkpoint_of(app)) is None:
        running = any(row["instance_id"] == instance_id and row["url"] for row in node.instances())
        if time.monotonic() > deadline or not running:
            words = node.log_of(instance_id)[-2000:]
            raise StartFailed(f"{app} made no checkpoint", hint="its log says why", log=words)
        time.sleep(0.1)
    return facts


def learn(node: OwnNode, target: Target) -> None:
    """Two starts that record what the first answer needs. Raises StartFailed where nothing is recorded."""
    done = 0
    while done < _LEARNING_RUNS:
        node.stop(target.app)
        node.settle()
        before = _changed(target.working_set)
        _, started = start(node, target, "learned")
        if started["memory"] == "prepared":
            continue  # it was in the making when the app was stopped
        deadline = time.monotonic() + _RECORD_PATIENCE
        while _changed(target.working_set) == before:
            if time.monotonic() > deadline:
                raise StartFailed(f"{target.app}: nothing was recorded", hint="the node's log says why")
            time.sleep(0.05)
        done += 1
    node.stop(target.app)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def start(node: OwnNode, target: Target, way: str) -> tuple[float, dict[str, Any]]:
    """One start, to its first right answer: (seconds, what the node said). Raises CallFailed for a wrong one."""
    workload = target.workload
    began = time.monotonic()
    started = node.start(target.app, **WAYS[way])
    answer = node.ask(workload.answer, started["url"])
    seconds = time.monotonic() - began
    if answer != target.expected:
        raise CallFailed(
            f"{workload.name}, {way}: the answer is wrong: {str(answer)[:200]}",
            hint=f"the original said {str(target.expected)[:200]}",
        )
    if started["restored"] != (way != "cold"):
        raise StartFailed(f"{workload.name}, {way}: was not restored", hint=str(started.get("reason")))
    return seconds, started


def rounds(node: OwnNode, series: Sequence[Series], runs: int, say: Say) -> None:
    """``runs`` starts of every series, interleaved."""
    for app in {each.target.app for each in series if each.way == "prepared"}:
        node.stop(str(node.start(app)["instance_id"]))  # from its first start on, one is kept prepared
        node.await_prepared(app)
    for number in range(runs):
        say(f"{series[0].target.workload.name}: round {number + 1} of {runs}")
        turn = number % len(series)
        for each in [*series[turn:], *series[:turn]]:
            _one(node, each)


def _one(node: OwnNode, series: Series) -> None:
    node.settle()
    (page_cache.drop if series.cache == "dropped" else page_cache.warm)(series.target.images)
    seconds, started = start(node, series.target, series.way)
    node.stop(str(started["instance_id"]))
    if series.way == "prepared":
        if started["memory"] != "prepared":
            raise StartFailed(f"{series.target.app}: none was prepared", hint="the node's log says why")
        node.await_prepared(series.target.app)  # the next one must not be made during another's start
    series.seconds.append(seconds)
    series.traces.append(started["trace"])
    series.memory = str(started["memory"])


def own_share(stages: Mapping[str, float]) -> float | None:
    """Seconds of a paged start that are neither runc's nor CRIU's.

    That is: up to the moment runc is started, our hook while runc waits for it, and what passes between CRIU's
    end and "ready". A restored port accepts before CRIU is done; then nothing comes after. None for a start
    without our pager, since nobody else says when CRIU is done.
    """
    if not {"pager_ready", "runc_started", "namespaces", "network", "ready"} <= stages.keys():
        return None
    hook = stages["network"] - stages["namespaces"]
    after = stages["ready"] - min(stages["ready"], stages.get("pager_restored", stages["ready"]))
    return round(stages["runc_started"] + hook + after, 4)


def _timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
