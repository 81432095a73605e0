"""docs/using.md against the command line: every command and every flag, and none that is not there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from relume.cli.arguments import parser

PAGE = (Path(__file__).parents[3] / "docs/using.md").read_text()
SECTION = PAGE.partition("\n## Commands\n")[2].partition("\n## ")[0]
EVERYWHERE = {"-o", "--output", "-h", "--help", "--version"}


def commands(
    command: argparse.ArgumentParser, words: tuple[str, ...] = ("relume",)
) -> Iterator[tuple[str, set[str]]]:
    """("relume apps ls", {"-o", "--output"}) for every command of the tree."""
    groups = [each for each in command._actions if isinstance(each, argparse._SubParsersAction)]
    if not groups:
        yield " ".join(words), {flag for each in command._actions for flag in each.option_strings}
    for group in groups:
        for name, child in group.choices.items():
            yield from commands(child, (*words, name))


def documented() -> dict[str, set[str]]:
    """The table's rows: the command's words, and every flag that the row names."""
    rows = {}
    for row in re.findall(r"^\| `relume .*", SECTION, re.MULTILINE):
        usage = re.match(r"\| `([a-z ]+[a-z])", row)
        assert usage is not None, row
        rows[usage[1]] = set(re.findall(r"(?<![\w-])(--?[a-zA-Z][\w-]*)", row))
    return rows


def test_every_command_and_flag_is_documented() -> None:
    there = {name: flags - EVERYWHERE for name, flags in commands(parser(None))}
    assert len(there) > 15
    assert documented() == there


def test_what_every_command_takes_is_documented() -> None:
    introduction = SECTION.partition("| command |")[0]
    assert all(re.search(rf"`[^`]*{flag}\b", introduction) for flag in EVERYWHERE)
