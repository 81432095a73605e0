"""`relume deploy [DIR]`: from an app's directory to a build that can be started."""

from __future__ import annotations

import sys
from argparse import Namespace

from relume.cli.arguments import Parser
from relume.cli.check import takes_an_app_directory
from relume.cli.client import NodeClient
from relume.cli.render import Screen, duration
from relume.cli.summary import summary
from relume.errors import BadRequest


def configure(parser: Parser) -> None:
    takes_an_app_directory(parser)
    parser.add_argument("-y", "--yes", "--disable-confirmation", action="store_true", help="do not ask")
    parser.add_argument("--fresh", action="store_true", help="build anew, with dependencies resolved anew")
    parser.add_argument("--name", metavar="NAME", help="instead of the file's name")
    parser.runs(deploy)


def deploy(options: Namespace) -> int:
    from relume.config import load_app

    screen = Screen(options.output)
    file = options.config_file and options.config_file.absolute()
    config = load_app(options.directory, config_file=file, name=options.name)
    config.require_deployable(gpus=None)  # the node knows how many it has
    screen.warnings(config.warnings)
    if not options.yes and (screen.as_json or not sys.stdin.isatty()):
        raise BadRequest("nobody is there to confirm the deployment", hint="use -y")
    screen.panel("DEPLOYMENT CONFIGURATION", summary(config))
    if not options.yes and not screen.confirmed("Do you want to deploy?"):
        screen.step("Nothing was deployed")
        return 1
    body = {"directory": str(config.directory), "fresh": options.fresh}
    body |= {"config_file": str(file)} if file else {}
    body |= {"name": options.name} if options.name else {}
    result = NodeClient().stream("/v1/deploy", body, screen.done)
    seconds = duration(result["seconds"])
    how = f"{result['how']}{', not in the region' if result['in_region'] is False else ''}"
    screen.data(result, [f"✓ {result['app']} is deployed in {seconds}: build {result['build_id']} ({how})"])
    if result["reason"]:
        screen.note(f"the region: {result['reason']}")
    screen.hint(f"next: relume start {result['app']}")
    return 0
