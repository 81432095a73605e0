"""`relume ps`: the instances of this node."""

from __future__ import annotations

from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient
from relume.cli.render import Screen

COLUMNS = (
    ("instance_id", "INSTANCE"),
    ("app", "APP"),
    ("build_id", "BUILD"),
    ("state", "STATE"),
    ("restored", "RESTORED"),
    ("url", "URL"),
    ("memory_bytes", "MEMORY"),
    ("started_at", "STARTED"),
)


def configure(parser: Parser) -> None:
    parser.runs(ps)


def ps(options: Namespace) -> None:
    Screen(options.output).table(NodeClient().get("/v1/instances"), COLUMNS, empty="No instances.")
