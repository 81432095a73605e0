"""End-to-end tests need root, real runc and CRIU.

One node serves the whole session, because making a base takes half a minute; others share its builds by hard links.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from harness import App, Relume


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" not in item.path.parts:
            continue
        if os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))


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
