"""`relume keys new|rotate FILE`: a region's key file. Works without a node."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from relume.cli.arguments import Parser
from relume.cli.render import Screen


def configure(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verb = verbs.add_parser("new", help="make a key file; nodes with the same one trust each other")
    verb.add_argument("file", metavar="FILE", help="the file to make, mode 0600; never overwritten")
    verb.runs(new)
    verb = verbs.add_parser("rotate", help="add an epoch to a key file: new objects are written under it")
    verb.add_argument("file", metavar="FILE", help="the key file; give the changed one to every node")
    verb.runs(rotate)


def new(options: Namespace) -> None:
    from relume.store.keys import new_key_file

    _say(options, new_key_file(Path(options.file)).id)


def rotate(options: Namespace) -> None:
    from relume.store.keys import rotate_key_file

    _say(options, rotate_key_file(Path(options.file)).id)


def _say(options: Namespace, epoch: bytes) -> None:
    data = {"file": options.file, "epoch": epoch.hex()}
    Screen(options.output).data(data, [f"{options.file}: epoch {epoch.hex()}"])
