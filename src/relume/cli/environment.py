"""Variables from the command line and from files, as docker's ``--env`` and ``--env-file`` read them.

Values are taken as they stand: no quotes are stripped, nothing is expanded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from relume.errors import BadRequest

_MAX_FILE = 1024 * 1024


def given_environment(assignments: Iterable[str], files: Iterable[str]) -> dict[str, str]:
    """Files first, in their order, then assignments. Raises BadRequest."""
    found: dict[str, str] = {}
    for path in map(Path, files):
        for number, line in enumerate(_text_of(path).splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                found.update(_pair(line.lstrip(), f"{path}:{number}"))
    for assignment in assignments:
        found.update(_pair(assignment, "--env"))
    return found


def _pair(text: str, place: str) -> dict[str, str]:
    name, equals, value = text.partition("=")
    name = name.strip()
    if not name or "\0" in text or any(character.isspace() for character in name):
        raise BadRequest(f"{place}: not a variable: {text!a}"[:200], hint="write it as NAME=VALUE")
    if equals:
        return {name: value}
    return {name: os.environ[name]} if name in os.environ else {}


def _text_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
        if len(raw) > _MAX_FILE:
            raise BadRequest(f"{path}: larger than {_MAX_FILE} bytes", hint="one NAME=VALUE a line")
        return raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path}: cannot be read: {error}", hint="one NAME=VALUE a line, in UTF-8") from None
