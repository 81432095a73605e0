"""docs/using.md against the command line: every command and every flag, and none that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from relume.cli.main import app

PAGE = (Path(__file__).parents[3] / "docs/using.md").read_text()
SECTION = PAGE.partition("\n## Commands\n")[2].partition("\n## ")[0]
EVERYWHERE = {"-o", "--output", "-h", "--help", "--version"}


def commands(command: Any, words: tuple[str, ...] = ("relume",)) -> Iterator[tuple[str, set[str]]]:
    """("relume apps ls", {"-o", "--output"}) for every command of the tree."""
    if children := getattr(command, "commands", None):
        for name, child in children.items():
            yield from commands(child, (*words, name))
    else:
        options = [each for each in command.params if each.param_type_name == "option"]
        yield " ".join(words), {flag for each in options for flag in (*each.opts, *each.secondary_opts)}


def documented() -> dict[str, set[str]]:
    """The table's rows: the command's words, and every flag that the row names."""
    rows = {}
    for row in re.findall(r"^\| `relume .*", SECTION, re.MULTILINE):
        usage = re.match(r"\| `([a-z ]+[a-z])", row)
        assert usage is not None, row
        rows[usage[1]] = set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", row))
    return rows


def test_every_command_and_flag_is_documented() -> None:
    there = {name: flags - EVERYWHERE for name, flags in commands(typer.main.get_command(app))}
    assert len(there) > 15
    assert documented() == there


def test_what_every_command_takes_is_documented() -> None:
    introduction = SECTION.partition("| command |")[0]
    assert all(re.search(rf"`[^`]*{flag}\b", introduction) for flag in EVERYWHERE)
