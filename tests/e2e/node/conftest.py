"""Tests that kill or starve a node start another, on a state directory that shares the session's node's builds."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from e2e.node import regions
from harness import App, Relume, share_builds


@pytest.fixture
def app(workplace: Path, relume: Relume, request: pytest.FixtureRequest) -> Iterator[App]:
    """An app directory with a name of its own, removed from the session's node at the end."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name.removeprefix("test_"))[
        :40
    ]
    made = App(workplace / name, name.strip("-").lower())
    yield made
    relume.remove(made.name)
    shutil.rmtree(made.directory, ignore_errors=True)


@pytest.fixture
def second(workplace: Path, relume: Relume) -> Iterator[Relume]:
    """Another node on the same machine, which a test may kill. It shares the first one's made bases."""
    state = workplace / f"state-{time.monotonic_ns()}"
    state.mkdir(mode=0o700)
    share_builds(relume, state)
    node = Relume(state)
    yield node
    with contextlib.suppress(subprocess.TimeoutExpired):
        if node.process is None or node.process.poll() is not None:
            node.start_node()
        node_id = leftovers.node_id(node)
        node.close()
        leftovers.soon_nothing(leftovers.of_node, node, node_id)
    shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def region(workplace: Path, relume: Relume) -> Iterator[regions.Region]:
    """A bucket with one checkpoint, which tests read and copy, and leave as it is."""
    with regions.made(workplace, relume) as made:
        yield made
