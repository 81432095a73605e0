"""`relume check`: what a cerebrium.toml says, as relume understands it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relume.cli.arguments import Parser
from relume.cli.render import Screen, grouped
from relume.cli.summary import summary

if TYPE_CHECKING:
    from relume.config import AppConfig


def configure(parser: Parser) -> None:
    takes_an_app_directory(parser)
    parser.add_argument("--strict", action="store_true", help="unknown keys are errors")
    parser.runs(check)


def takes_an_app_directory(parser: Parser) -> None:
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=Path(),
        help="the app's directory (default: .)",
    )
    parser.add_argument(
        "--config-file", metavar="FILE", type=Path, help="another file than DIR/cerebrium.toml"
    )


def check(options: Namespace) -> None:
    from relume.config import load_app

    screen = Screen(options.output)
    file = options.config_file and options.config_file.absolute()
    config = load_app(options.directory, config_file=file, strict=options.strict)
    screen.data(_as_json(config), [f"{config.name}: {config.file}", *grouped(summary(config))])
    screen.warnings(config.warnings)


def _as_json(config: AppConfig) -> dict[str, Any]:
    tables = ("deployment", "runtime", "hardware", "scaling", "dependencies", "experimental", "relume")
    return {
        "app": config.name,
        "file": str(config.file),
        "checkpointing": config.checkpointing,
        "config": {name: getattr(config, name).model_dump(mode="json") for name in tables},
        "warnings": [warning.as_dict() for warning in config.warnings],
    }
