"""docs/architecture.md against the code: the rooms it lists are the rooms there are, and imports point downwards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src/relume"
PAGE = (ROOT / "docs/architecture.md").read_text()

# What lies in these is copied into containers. There it stands alone, and `relume` means the SDK.
GUEST_TREES = (SOURCE / "guest/runner", SOURCE / "guest/sdk")


def rooms() -> list[str]:
    """The rooms in the page's order, top first: `cli/` is "cli", `errors.py` is "errors"."""
    listing = PAGE.partition("## Rooms")[2].split("```")[1]
    return [name for name, _, _ in re.findall(r"^(\w+)(/|\.py)\s+(\S.*)$", listing, re.MULTILINE)]


def modules() -> list[Path]:
    return sorted(
        path
        for path in SOURCE.rglob("*.py")
        if path.parent != SOURCE or path.name not in ("__init__.py", "__main__.py")
    )


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module, `from relume.a import b` as "relume.a.b"."""
    package = ("relume", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *((node.module,) if node.module else ())))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def test_the_page_lists_the_rooms_there_are() -> None:
    there = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in modules()}
    assert len(there) > 10
    assert there <= set(rooms())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    order = rooms()
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    wrong = []
    for line, name in imported(path):
        top, *rest = name.split(".")
        if top != "relume" or not rest or rest[0] not in order:
            continue  # not ours, or a name of the package itself
        if tree := next((tree for tree in GUEST_TREES if path.is_relative_to(tree)), None):
            if not name.startswith(".".join(("relume", *tree.relative_to(SOURCE).parts))):
                wrong.append(f"line {line}: {name}: what goes into a container stands alone")
            continue
        if order.index(rest[0]) < order.index(room):
            wrong.append(f"line {line}: {name}: {rest[0]} is above {room}")
        if rest[0] != room and any(part.startswith("_") for part in rest[1:]):
            wrong.append(f"line {line}: {name}: private to {rest[0]}")
    assert not wrong, "\n".join([f"{path.relative_to(ROOT)}:", *wrong])
