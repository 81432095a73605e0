"""Two nodes, each with a state of its own, on one machine: neither ever touches what is the other's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from harness import MAIN, SNIPPET, App, Failed, Relume, get


@pytest.fixture
def both(second: Relume, relume: Relume, app: App) -> Iterator[tuple[Relume, Relume]]:
    """The session's node and another, with the same app deployed on both."""
    app.write(f"{SNIPPET}\nserve()")
    second.start_node()
    for node in (relume, second):
        node.deploy(app.directory)
    yield relume, second


def test_the_same_app_on_both(both: tuple[Relume, Relume], app: App) -> None:
    nodes = [leftovers.node_id(node) for node in both]
    assert nodes[0] != nodes[1]
    started = [node.start(app.name) for node in both]
    assert [one["restored"] for one in started] == [False, False], "a checkpoint belongs to a node"
    copies = [node.start(app.name) for node in both]
    assert [one["restored"] for one in copies] == [True, True]
    assert len({one["url"] for one in (*started, *copies)}) == 4
    for node, own in zip(both, (started[0], started[1]), strict=True):
        ids = {row["instance_id"] for row in node.ps(app.name)}
        assert own["instance_id"] in ids
        assert len(ids) == 2
    with pytest.raises(Failed) as unknown:
        both[0].json("stop", started[1]["instance_id"])
    assert unknown.value.error["code"] == "not_found"

    # One is killed, and comes back sweeping; one stops its app; one goes for good.
    both[1].kill_node()
    both[1].start_node()
    assert [get(one, "/count")["hits"] for one in (*started, *copies)] == [1, 1, 1, 1]
    both[0].run("stop", app.name)
    assert [get(one, "/count")["hits"] for one in (started[1], copies[1])] == [2, 2]
    again = both[0].start(app.name)
    both[1].run("apps", "rm", app.name)
    both[1].kill_node(signal.SIGTERM)
    assert get(again, "/count")["hits"] == 1
    leftovers.soon_nothing(leftovers.of_node, both[1], nodes[1])
    assert both[0].start(app.name)["restored"]


def test_a_second_node_on_the_same_state_is_refused(relume: Relume, app: App) -> None:
    app.write("serve()")
    relume.deploy(app.directory)
    started = relume.start(app.name)
    done = subprocess.run(
        [*MAIN, "node", "run"], env=relume.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"another node runs on {relume.state}" in done.stderr
    assert "RELUME_STATE" in done.stderr
    assert "Traceback" not in done.stderr
    get(started, "/count")
    assert [row["state"] for row in relume.ps(app.name)] == ["ready"], "and the first one serves its socket"


def test_a_copied_state_is_refused_while_the_first_node_runs(both: tuple[Relume, Relume], app: App) -> None:
    """A copy has the same node id: it would take the first one's instances for its own leftovers."""
    first = both[1]
    started = first.start(app.name)
    copy = Relume(first.state.with_name(first.state.name + "-copy"))
    subprocess.run(["cp", "-a", "--reflink=auto", str(first.state), str(copy.state)], check=True)
    try:
        done = subprocess.run(
            [*MAIN, "node", "run"], env=copy.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert "a copy" in done.stderr
        assert get(started, "/count")["hits"] == 1
    finally:
        shutil.rmtree(copy.state)


def test_what_is_not_ours_stays(second: Relume) -> None:
    """A node that comes up sweeps below its own directory only, and only what looks like an instance."""
    second.start_node()
    node = leftovers.node_id(second)
    second.kill_node()
    stranger = Path("/run/relume") / f"{node}x" / "i-000000000000"
    own = Path("/run/relume") / node / "i-000000000000"
    kept = Path("/run/relume") / node / "notes"
    for directory in (stranger, own, kept):
        directory.mkdir(parents=True)
    try:
        second.start_node()
        assert stranger.is_dir()
        assert kept.is_dir()
        assert not own.exists()
    finally:
        os.removedirs(stranger)
        kept.rmdir()
