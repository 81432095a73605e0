"""What a command costs before it does anything, and that the whole command line is described."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from relume.cli.arguments import COMMANDS, parser

HEAVY = {
    "aiohttp",
    "asyncio",
    "dataclasses",
    "http.client",
    "importlib.metadata",
    "inspect",
    "pydantic",
    "rich",
    "relume.config",
    "ssl",
    "subprocess",
    "typer",
}


def test_start_loads_nothing_heavy(state: Path) -> None:
    program = "import sys; from relume.cli.main import main; main(['start', 'x']); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "relume.cli.start" in ran.stdout.split()
    assert HEAVY & set(ran.stdout.split()) == set()


def test_every_argument_has_help() -> None:
    def walk(inner: argparse.ArgumentParser, path: str) -> None:
        for action in inner._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    walk(child, f"{path} {name}")
            else:
                assert action.help, f"{path}: {action.option_strings or action.dest}"

    whole = parser(None)
    walk(whole, "relume")
    assert set(COMMANDS) == set(next(a for a in whole._actions if a.choices).choices)
