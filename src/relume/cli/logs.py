"""`relume logs`: an instance's output, byte by byte, and nothing else."""

from __future__ import annotations

from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient, segment
from relume.cli.render import Screen


def configure(parser: Parser) -> None:
    parser.add_argument(
        "target", metavar="APP|INSTANCE", help="an instance, or an app: then its newest instance"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="wait for more")
    parser.runs(logs, output=False)


def logs(options: Namespace) -> None:
    screen = Screen()
    query = "?follow=1" if options.follow else ""
    for chunk in NodeClient().raw(f"/v1/logs/{segment(options.target)}{query}"):
        screen.raw(chunk)
