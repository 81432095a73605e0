"""`relume bench`: how long each way of starting takes to the first right answer, on this machine.

It runs a node of its own in a temporary state, so nothing that runs here is touched; other load on the machine
is not kept away, which is why the ways are interleaved and their ratios are what counts.
"""

from __future__ import annotations

import signal
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from relume.cli.arguments import Parser
from relume.cli.render import Screen, size
from relume.errors import BadRequest, HostError, RelumeError
from relume.linux import memory

if TYPE_CHECKING:
    from relume.cli.benchmark.own_node import OwnNode
    from relume.cli.benchmark.workloads import Workload

_WORKLOADS = ("tiny", "touch-2g", "touch-8g", "model", "python-web", "forks", "redis")
_ON_REQUEST = ("vllm-cpu", "torch-gpu")
"""Workloads that are measured only when they are named: they download hundreds of MB and take minutes, and the
second needs a GPU."""
_WAYS = ("cold", "criu-eager", "criu-lazy", "first", "learned", "prepared")
_CACHES = ("warm", "dropped")
_REGION_WORKLOADS = ("model", "python-web")
"""One for transfers and first answers, one for many nodes at once."""
_CLONE_WAYS = ("criu-eager", "learned")

_ROOM = 1.1
"""Memory to be free, as a multiple of what all instances hold and the images take in the page cache."""


def configure(parser: Parser) -> None:
    parser.add_argument(
        "--workload",
        dest="workloads",
        nargs="+",
        action="extend",
        choices=_WORKLOADS + _ON_REQUEST,
        metavar="NAME",
        help=f"what to start (default: {', '.join(_WORKLOADS)}); only when named: {', '.join(_ON_REQUEST)}",
    )
    parser.add_argument(
        "--way",
        dest="ways",
        nargs="+",
        action="extend",
        choices=_WAYS,
        metavar="NAME",
        help=f"how (default: all): {', '.join(_WAYS)}",
    )
    parser.add_argument(
        "--cache",
        dest="caches",
        nargs="+",
        action="extend",
        choices=_CACHES,
        metavar="STATE",
        help="the page cache before each start: warm, dropped (default: both)",
    )
    parser.add_argument("--runs", type=_positive, default=5, metavar="N", help="starts of each (default: 5)")
    parser.add_argument(
        "--clones",
        type=_positive,
        metavar="N",
        help="N at once instead: time to the last answer, memory of each",
    )
    parser.add_argument(
        "--region",
        action="store_true",
        help="nodes that share a bucket instead (an S3 server on loopback, of script/bootstrap --dev): upload, "
        "download, the first answer of a node that has never seen the checkpoint, many nodes at once",
    )
    parser.add_argument(
        "--nodes", type=_positive, default=8, metavar="N", help="with --region: nodes at once (default: 8)"
    )
    parser.runs(bench)
    parser.add_argument(
        "--json", dest="output", action="store_const", const="json", help="the same as -o json: rows only"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def bench(options: Namespace) -> int:
    from relume.cli.benchmark import report
    from relume.cli.benchmark.own_node import own_node
    from relume.cli.benchmark.workloads import WORKLOADS

    _go_in_order()
    screen = Screen(options.output)
    if options.region:
        return _region(options, screen)
    if options.clones and "prepared" in (options.ways or ()):
        raise BadRequest("--clones with --way prepared", hint="one is prepared at a time; leave one out")
    ways = list(dict.fromkeys(options.ways or (_CLONE_WAYS if options.clones else _WAYS)))
    rows: list[dict[str, Any]] = []
    failed = 0
    with own_node() as node:
        for name in dict.fromkeys(options.workloads or _WORKLOADS):
            workload = WORKLOADS[name]
            try:
                _require_memory(workload.memory_bytes, name, instances=options.clones or 1)
                if options.clones:
                    rows += _clones(node, workload, ways, options, screen.step)
                else:
                    rows += _single(node, workload, ways, options, screen.step)
            except RelumeError as error:
                failed += 1
                screen.note(f"{name}: {error.message} ({error.hint})")
                screen.step(f"  {error.details.get('log') or ''}\n{node.last_words(12)}")
            finally:
                node.clear()
    if screen.as_json:
        screen.data(rows)
    elif rows:
        screen.table(report.table(rows), report.COLUMNS, empty="nothing was measured")
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        screen.data(None, report.chart(rows, block="█" if unicode else "#"))
    return 1 if failed else 0


def _go_in_order() -> None:
    """However the benchmark is told to go, also where Ctrl-C is ignored (nohup), its node goes with it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def go(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, go)


def _region(options: Namespace, screen: Screen) -> int:
    from relume.cli.benchmark import region, report
    from relume.cli.benchmark.workloads import WORKLOADS

    names = options.workloads or _REGION_WORKLOADS
    one, many = WORKLOADS[names[0]], WORKLOADS[names[-1]]
    rows: list[dict[str, Any]] = []
    try:
        _require_memory(one.memory_bytes, one.name)
        _require_memory(
            many.memory_bytes, f"{options.nodes} x {many.name}", instances=options.nodes, images=options.nodes
        )
        rows.extend(region.run(one, many, options.nodes, options.runs, screen.step))
    finally:
        if screen.as_json:
            screen.data(rows)
        elif rows:
            screen.table(report.region_table(rows), report.REGION_COLUMNS, empty="nothing was measured")
    return 0


def _single(
    node: OwnNode, workload: Workload, ways: Sequence[str], options: Namespace, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    from relume.cli.benchmark import measure, page_cache

    caches = list(dict.fromkeys(options.caches or _CACHES))
    limits = page_cache.write_limits(node.state)
    target = ready = measure.deploy(node, workload, say)
    disk = page_cache.sequential_speed(target.images) if "dropped" in caches else None
    if "learned" in ways:
        say(f"{workload.name}: learning")
        measure.learn(node, target)
    if "prepared" in ways:
        ready = measure.deploy(node, workload, say, variant="-prepared", policy=measure.PREPARED_POLICY)
        measure.learn(node, ready)
    series = [
        measure.Series(ready if way == "prepared" else target, way, cache) for cache in caches for way in ways
    ]
    measure.rounds(node, series, options.runs, say)
    return [each.row(disk, limits) for each in series]


def _clones(
    node: OwnNode, workload: Workload, ways: Sequence[str], options: Namespace, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    from relume.cli.benchmark import clones

    target = clones.deploy(node, workload, say)
    flights = clones.fly(node, target, ways, options.clones, options.runs, say)
    return clones.rows(target, flights, options.clones)


def _require_memory(held: int, name: str, *, instances: int = 1, images: int = 1) -> None:
    """Raises HostError where the workload would push the machine, and what else runs on it, out of memory.

    ``held`` are the bytes of one instance, and of one checkpoint's images.
    """
    available = memory.machine().available
    if (needed := round(held * (instances + images) * _ROOM)) > available:
        raise HostError(
            f"{name} needs {size(needed)} of memory and {size(available)} are available",
            hint="fewer clones, or another --workload",
        )
