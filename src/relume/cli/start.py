"""`relume start APP`: an instance, from its checkpoint if there is one that fits, and ready when this returns."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient, segment
from relume.cli.environment import given_environment
from relume.cli.render import Screen, duration, size


def configure(parser: Parser) -> None:
    parser.add_argument("app", metavar="APP", help="the app's name")
    parser.add_argument("--no-restore", action="store_true", help="boot cold, whatever is saved")
    parser.add_argument(
        "--explain", action="store_true", help="say what a start would do, and why; start nothing"
    )
    parser.add_argument("--trace", action="store_true", help="print where the time went")
    parser.add_argument(
        "-e",
        "--env",
        action="append",
        default=[],
        metavar="K=V",
        help="set a variable; K alone passes yours on (again for more)",
    )
    parser.add_argument(
        "--env-file",
        action="append",
        default=[],
        metavar="FILE",
        help="variables, one K=V a line (again for more)",
    )
    parser.runs(start)


def start(options: Namespace) -> None:
    screen = Screen(options.output)
    body = {
        "restore": not options.no_restore,
        "explain": options.explain,
        "env": given_environment(options.env, options.env_file),
    }
    result = NodeClient().stream(f"/v1/apps/{segment(options.app)}/start", body, screen.step)
    if options.explain:
        screen.record(result)
    else:
        screen.data(result, [*_lines(result), *(_timeline(result["trace"]) if options.trace else ())])


def _lines(result: dict[str, Any]) -> list[str]:
    how = f"restored from {result['checkpoint_id']}" if result["restored"] else "booted cold"
    reason = f" ({result['reason']})" if result.get("reason") else ""
    memory = [f"  memory    {result['memory']}"] if result.get("memory", "").startswith("eager") else []
    return [
        f"✓ {result['app']} is ready in {duration(result['ready_s'])}: {how}{reason}",
        f"  instance  {result['instance_id']}",
        f"  url       {result['url']}",
        *memory,
    ]


def _timeline(trace: dict[str, float]) -> list[str]:
    """When each stage was over, and what was asked of the region's store for it (``store_...``, no times)."""
    stages = {name: value for name, value in trace.items() if not name.startswith("store_")}
    width = max(map(len, stages), default=0)
    lines = ["  since the start"]
    lines += [f"    {stage:<{width}}  {duration(seconds):>8}" for stage, seconds in stages.items()]
    if "store_bytes" in trace:
        lines.append(
            f"  from the store: {size(trace['store_bytes'])} in {trace['store_requests']:.0f} requests"
        )
    return lines
