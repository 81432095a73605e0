"""The command line: which commands there are, and what each takes.

A command file has ``configure(parser)``, which adds its arguments and says what runs. Only the invoked command's
file is imported; the rest of the table is its line of help.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

from relume.errors import BadRequest

COMMANDS = {
    "doctor": "test this machine for what relume needs",
    "init": "make a directory with a small app",
    "check": "read an app's cerebrium.toml and say what it means",
    "deploy": "build an app; the next start uses the new build",
    "start": "start an instance of an app and wait until it is ready",
    "ps": "list instances",
    "logs": "print what an instance wrote",
    "call": "send one HTTP request to an app's running instance",
    "stop": "stop an instance, or all of an app",
    "apps": "list and remove deployed apps",
    "checkpoints": "list, inspect, verify, remove and explain checkpoints; move them through the region",
    "keys": "make and rotate the key file that the nodes of a region share",
    "secrets": "set, list and remove an app's secret variables",
    "bench": "measure every way of starting on this machine",
    "node": "run the agent of this machine, or ask how it is",
}
"""Command -> one line of help. The command's module has the same name."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors that are raised (so that -o json holds for them too) and no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise BadRequest(message, hint=f"{self.prog} --help")

    def runs(self, command: Callable[[argparse.Namespace], int | None], *, output: bool = True) -> None:
        """Name the function of this command; ``output`` gives it ``-o``."""
        self.set_defaults(run=command)
        if output:
            self.add_argument(
                "-o",
                "--output",
                choices=("table", "json"),
                default="table",
                help="how the result is printed (default: table)",
            )


def parser(invoked: str | None) -> Parser:
    """The whole parser, with the arguments of one command filled in; of all for None (documentation, tests)."""
    top = Parser(prog="relume", description="Start containers from a memory checkpoint.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if invoked in (None, name):
            import_module(f"{__package__}.{name}").configure(command)
    return top
