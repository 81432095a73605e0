"""N starts at once of one checkpoint: the time to the last first answer, and the memory each clone then holds.

With ``fill = "demand"``, so that what a clone holds is what it touched and not how far the fill has got.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from relume.cli.benchmark import measure, page_cache
from relume.cli.benchmark.measure import Say, Target
from relume.cli.benchmark.own_node import OwnNode
from relume.cli.benchmark.workloads import Workload
from relume.linux import cgroup


@dataclass(slots=True)
class Flight:
    """What the runs of one way showed: per run the seconds to each clone's answer, per clone its bytes."""

    way: str
    answers: list[list[float]] = field(default_factory=list)
    pss: list[int] = field(default_factory=list)
    charged: list[int] = field(default_factory=list)


def deploy(node: OwnNode, workload: Workload, say: Say) -> Target:
    """As for single starts, but filled on demand only, and learned."""
    target = measure.deploy(node, workload, say, variant="-clones", policy={"fill": "demand"})
    measure.learn(node, target)
    return target


def fly(node: OwnNode, target: Target, ways: Sequence[str], count: int, runs: int, say: Say) -> list[Flight]:
    """``runs`` times ``count`` clones at once, each way in turn, the page cache warm."""
    flights = [Flight(way) for way in ways]
    for run in range(runs):
        for flight in flights:
            say(f"{target.workload.name}: {count} clones, {flight.way}, run {run + 1} of {runs}")
            page_cache.warm(target.images)
            node.settle()
            _once(node, target, flight, count)
    return flights


def _once(node: OwnNode, target: Target, flight: Flight, count: int) -> None:
    began = time.monotonic()

    def one(number: int) -> tuple[float, str]:
        _, started = measure.start(node, target, flight.way)
        return time.monotonic() - began, str(started["instance_id"])

    try:
        with ThreadPoolExecutor(count) as pool:
            arrived = list(pool.map(one, range(count)))
        flight.answers.append([seconds for seconds, _ in arrived])
        for _, instance_id in arrived:
            group = node.memory_group(instance_id)
            flight.pss.append(sum(map(_pss, cgroup.processes(group))))
            flight.charged.append(cgroup.memory(group)[0])
    finally:
        node.stop(target.app)


def _pss(pid: int) -> int:
    """Proportional set size in bytes, from smaps_rollup (proc_pid_smaps_rollup(5)); 0 for one that ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def rows(target: Target, flights: Sequence[Flight], count: int) -> list[dict[str, Any]]:
    """One JSON row for each way; ``last_answer_s`` and ``first_answer_s`` are medians over the runs."""
    touched = target.touched_bytes()
    return [
        {
            "workload": target.workload.name,
            "way": flight.way,
            "cache": "warm",
            "clones": count,
            "fill": "demand",
            "last_answer_s": round(statistics.median(map(max, flight.answers)), 4),
            "first_answer_s": round(statistics.median(chain.from_iterable(flight.answers)), 4),
            "runs": len(flight.answers),
            "spread": [
                round(choose(map(max, flight.answers)), 4)
                for choose in (min, max)  # of last_answer_s
            ],
            "image_bytes": target.image_bytes,
            "touched_bytes": touched,
            "pss_bytes": round(statistics.median(flight.pss)),
            "cgroup_bytes": round(statistics.median(flight.charged)),
            "hashed": False,
        }
        for flight in flights
    ]
