"""What relume itself adds to a build: the SDK (``import relume`` inside) and, for apps of functions, the runner.

They lie in a layer of their own, at ``/opt/relume/guest``, on Python's path after everything of the app's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from relume import guest
from relume.build import files, tree
from relume.build.plan import key_of
from relume.build.python import VENV
from relume.config import AppConfig

PLACE = "/opt/relume/guest"


@dataclasses.dataclass(frozen=True, slots=True)
class Guest:
    """The trees to add, and what the runner needs (nothing for apps with an entrypoint)."""

    trees: tuple[files.AppFiles, ...]
    requirements: tuple[str, ...] = ()
    argv: tuple[str, ...] | None = None

    @property
    def digest(self) -> str:
        return key_of([entries.digest for entries in self.trees])


def for_app(config: AppConfig) -> Guest:
    """The SDK for every app; the runner for one without an entrypoint of its own."""
    if config.runtime.custom:
        return Guest((_tree(guest.sdk_tree()),))
    return Guest(
        (_tree(guest.sdk_tree()), _tree(guest.runner_tree())),
        tuple(guest.runner_requirements()),
        guest.runner_argv(8000, concurrency=config.concurrency),
    )


def _tree(root: Path) -> files.AppFiles:
    """A tree without this checkout's modes; the package file that only the host's tests need is left out."""
    found = files.scan(root, ["./*"], ["./__init__.py", "./requirements.txt"])
    entries = tuple(
        dataclasses.replace(entry, mode=0o755 if entry.kind == "directory" else 0o644)
        for entry in found.entries
    )
    return files.AppFiles(root, entries)


def add(merged: Path, added: Guest, check: Callable[[], None] = tree.nothing) -> None:
    """Copy the trees into a root file system, and put them on the path of its virtual environment."""
    place = merged / PLACE.lstrip("/")
    place.mkdir(parents=True)
    for entries in added.trees:
        entries.copy(place, check)
    for packages in (merged / VENV.lstrip("/")).glob("lib/python3.*/site-packages"):
        (packages / "relume-guest.pth").write_text(f"{PLACE}\n")
