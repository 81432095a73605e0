"""`relume node run|status`: the agent of this machine."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient, state_directory
from relume.cli.render import Screen


def configure(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verb = verbs.add_parser("run", help="run the node in the foreground until SIGTERM; instances live on")
    verb.add_argument("--config", metavar="FILE", type=Path, help="the node's settings (node.toml)")
    verb.runs(run, output=False)
    verbs.add_parser("status", help="exit status 0 when a node answers, 3 when none does").runs(status)


def run(options: Namespace) -> None:
    from relume.config import load_node
    from relume.node.main import run as run_node

    settings = load_node(options.config)
    screen = Screen()
    for warning in settings.warnings:
        screen.note(str(warning))
    run_node(settings, state_directory())


def status(options: Namespace) -> None:
    Screen(options.output).record(NodeClient().get("/v1/status"))
