"""`relume apps ls|rm`."""

from __future__ import annotations

from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient, segment
from relume.cli.render import Screen

COLUMNS = (
    ("app", "APP"),
    ("build_id", "BUILD"),
    ("instances", "INSTANCES"),
    ("directory", "DIRECTORY"),
    ("created_at", "CREATED"),
)


def configure(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verbs.add_parser("ls", help="list deployed apps").runs(list_apps)
    rm = verbs.add_parser("rm", help="stop an app and remove its builds, checkpoints and secrets")
    rm.add_argument("app", metavar="APP", help="the app's name")
    rm.runs(remove)


def list_apps(options: Namespace) -> None:
    Screen(options.output).table(
        NodeClient().get("/v1/apps"), COLUMNS, empty="No apps. `relume deploy DIR` makes one."
    )


def remove(options: Namespace) -> None:
    result = NodeClient().delete(f"/v1/apps/{segment(options.app)}")
    screen = Screen(options.output)
    screen.removed("app", options.app)
    if result.get("reason"):
        screen.note(result["reason"])
