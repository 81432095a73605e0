"""One node serves the whole session, because making a base takes half a minute; tests that kill or starve a node
start another, on a state directory that shares the first one's builds by hard links.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from e2e.node import regions
from harness import App, Relume, share_builds


@pytest.fixture(scope="session")
def workplace() -> Iterator[Path]:
    """A directory for states and apps, on a real disk, below a 0700 one."""
    place = Path("/var/tmp") / f"relume-test-{os.getpid()}"
    place.mkdir(mode=0o700)
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def relume(workplace: Path) -> Iterator[Relume]:
    """The session's node, with a base already built."""
    interfaces = leftovers.interfaces()
    node = Relume(workplace / "state")
    if made := os.environ.get(
        "RELUME_TEST_BUILDS"
    ):  # of a state directory on the same disk: no base is made then
        node.state.mkdir(mode=0o700)
        subprocess.run(["cp", "-al", made, str(node.state / "builds")], check=True)
    node.start_node()
    node_id = leftovers.node_id(node)
    warm = App(workplace / "warm", "warm").write("serve()", checkpointing=False)
    node.deploy(warm.directory)
    yield node
    node.close()
    leftovers.soon_nothing(leftovers.of_node, node, node_id)
    assert leftovers.interfaces() <= interfaces
    log = node.log.read_text()
    assert "Traceback" not in log, log[-8000:]


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
