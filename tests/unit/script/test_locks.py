"""The lock files against pyproject.toml, and against what script/bootstrap promises of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def normal(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: str) -> dict[str, set[str]]:
    """Pinned versions by name. More than one where Python versions need different ones."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(
        r"^([\w.-]+)(?:\[[\w,-]+\])?==([^ ;\\]+)", (ROOT / lock).read_text(), re.MULTILINE
    ):
        versions.setdefault(normal(name), set()).add(version)
    return versions


def declared() -> dict[str, list[str]]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    runtime = project["project"]["dependencies"] + groups["build"]
    return {"requirements.lock": runtime, "requirements-dev.lock": runtime + groups["dev"]}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_dependency_is_locked(lock: str) -> None:
    names = {normal(re.split(r"[\s\[<>=!~;]", requirement)[0]) for requirement in declared()[lock]}
    assert names - locked(lock).keys() == set(), "script/bootstrap --relock"


def test_the_tests_run_with_the_versions_that_users_get() -> None:
    runtime, dev = (locked(lock) for lock in LOCKS)
    assert runtime.items() <= dev.items()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes_and_names_no_index(lock: str) -> None:
    for entry in re.split(r"\n(?=\S)", (ROOT / lock).read_text()):
        if not entry.startswith("#"):
            assert "==" in entry and "--hash=sha256:" in entry, entry.partition("\n")[0]
