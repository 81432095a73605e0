"""`relume stop`: end one instance, or all of an app."""

from __future__ import annotations

from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient
from relume.cli.render import Screen


def configure(parser: Parser) -> None:
    parser.add_argument("target", metavar="APP|INSTANCE", help="an app's name or an instance")
    parser.runs(stop)


def stop(options: Namespace) -> None:
    screen = Screen(options.output)
    result = NodeClient().post("/v1/stop", {"target": options.target})
    if not result["stopped"]:
        screen.note(f"nothing of {options.target} was running")
    screen.data(result, result["stopped"])
