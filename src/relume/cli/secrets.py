"""`relume secrets set|list|rm`: environment variables that are in no build, log or checkpoint manifest.

A value on the command line is seen by whoever lists processes; a name alone is asked for, or read from stdin.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient, segment
from relume.cli.environment import given_environment
from relume.cli.render import Screen
from relume.errors import BadRequest


def configure(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verb = verbs.add_parser("set", help="set secrets; instances get them from their next start on")
    verb.add_argument("app", metavar="APP", help="the app's name")
    verb.add_argument("pairs", nargs="*", metavar="K[=V]", help="K alone is asked for, or read from stdin")
    verb.add_argument(
        "--env-file", action="append", default=[], metavar="FILE", help="secrets, one K=V a line"
    )
    verb.runs(set_secrets)
    verb = verbs.add_parser("list", help="list the names of an app's secrets, never their values")
    verb.add_argument("app", metavar="APP", help="the app's name")
    verb.runs(list_secrets)
    verb = verbs.add_parser("rm", help="remove secrets")
    verb.add_argument("app", metavar="APP", help="the app's name")
    verb.add_argument("names", nargs="+", metavar="K", help="names of secrets")
    verb.runs(remove)


def set_secrets(options: Namespace) -> None:
    screen = Screen(options.output)
    pairs = [pair if "=" in pair else f"{pair}={_asked_for(pair)}" for pair in options.pairs]
    values = given_environment(pairs, options.env_file)
    if not values:
        raise BadRequest("no secret given", hint=f"relume secrets set {options.app} NAME")
    NodeClient().put(f"/v1/secrets/{segment(options.app)}", values)
    screen.data({"app": options.app, "set": list(values)}, list(values))


def list_secrets(options: Namespace) -> None:
    names: list[str] = NodeClient().get(f"/v1/secrets/{segment(options.app)}")
    Screen(options.output).data(names, names)


def remove(options: Namespace) -> None:
    screen = Screen(options.output)
    for name in options.names:
        NodeClient().delete(f"/v1/secrets/{segment(options.app)}?key={segment(name)}")
    screen.data({"app": options.app, "removed": options.names}, options.names)


def _asked_for(name: str) -> str:
    if sys.stdin.isatty():
        from getpass import getpass

        return getpass(f"{name}: ")
    line = sys.stdin.readline()
    if not line:
        raise BadRequest(f"no value for {name}", hint="write one line for each name on stdin")
    return line.rstrip("\r\n")
