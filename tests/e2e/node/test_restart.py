"""The node is killed, at every moment: instances don't notice, and the next run finishes or clears what was begun."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import leftovers
from harness import MAIN, SNIPPET, App, Relume, get, in_its_dump, until
from relume.linux import cgroup

TICKS = """
def tick():
    number = 0
    while True:
        print("tick", number, flush=True)
        number += 1
        time.sleep(0.02)
threading.Thread(target=tick, daemon=True).start()
"""

POST = """
import urllib.request
def post(_=None):
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST", data=b"")
    return json.loads(urllib.request.urlopen(request, timeout=600).read())
ACTIONS["post"] = post
"""


def making(relume: Relume) -> list[Path]:
    return list((relume.state / "checkpoints").glob(".making-*"))


def asked(url: str, path: str) -> tuple[http.client.HTTPConnection, Any]:
    """An open connection through the published port, and what it answered."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    return connection, again(connection, path)


def again(connection: http.client.HTTPConnection, path: str) -> Any:
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


def ticks(log: str) -> list[int]:
    return [int(number) for number in re.findall(r"^tick (\d+)$", log, re.MULTILINE)]


def living(relume: Relume, app: str) -> list[dict[str, Any]]:
    return [row for row in relume.ps(app) if row["state"] not in ("exited", "failed")]


@contextlib.contextmanager
def starting(relume: Relume, app: App, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ``relume start`` of its own process, which may be killed."""
    client = subprocess.Popen(
        [*MAIN, "start", app.name, *arguments],
        env=relume.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield client
    finally:
        client.kill()
        client.wait()


def moments(length: float, count: int) -> list[float]:
    """``count`` moments spread over ``length`` seconds, each at random in its part."""
    return [(number + random.random()) * length / count for number in range(count)]


def test_instances_do_not_notice(second: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\n{TICKS}\nserve()")
    second.start_node()
    second.deploy(app.directory)
    started = [second.start(app.name) for _ in range(2)]
    assert [one["restored"] for one in started] == [False, True]
    connections = [asked(one["url"], "/count")[0] for one in started]

    second.kill_node()
    assert [again(connection, "/count")["hits"] for connection in connections] == [2, 2]
    assert [get(one, "/count")["hits"] for one in started] == [3, 3], "and the port takes new connections"
    time.sleep(0.3)
    second.start_node()

    rows = {row["instance_id"]: (row["state"], row["url"]) for row in second.ps(app.name)}
    assert rows == {one["instance_id"]: ("ready", one["url"]) for one in started}
    assert [again(connection, "/count")["hits"] for connection in connections] == [4, 4]
    for connection in connections:
        connection.close()
    for one in started:
        seen = ticks(second.logs(one["instance_id"]))
        assert seen == list(range(len(seen))), "no line is missing"
        assert len(seen) > 20
    assert get(started[0], "/status")["restored"] is False
    assert second.start(app.name)["restored"], "and the next one starts from the same checkpoint"

    for connection in connections:
        connection.close()
    node = leftovers.node_id(second)
    second.run("stop", started[0]["instance_id"])
    leftovers.soon_nothing(leftovers.of_instance, node, started[0]["instance_id"])
    second.run("stop", app.name)
    for one in started:
        leftovers.soon_nothing(leftovers.of_instance, node, one["instance_id"])
    assert {row["state"] for row in second.ps(app.name)} == {"exited"}


def test_an_end_while_no_node_runs(second: Relume, app: App) -> None:
    app.write(
        """
print("the last words", flush=True)
ACTIONS["end"] = lambda code: threading.Timer(0.05, os._exit, (int(code),)).start()
serve()
"""
    )
    second.start_node()
    second.deploy(app.directory)
    started, killed = (second.start(app.name) for _ in range(2))
    node = leftovers.node_id(second)
    second.kill_node()
    with contextlib.suppress(OSError):  # a machine that stands still may let the timer win
        get(started, "/end/7")
    for pid in cgroup.processes(f"/relume/{node}/{killed['instance_id']}"):
        os.kill(pid, signal.SIGKILL)
    for one in (started, killed):
        until(lambda one=one: not cgroup.processes(f"/relume/{node}/{one['instance_id']}"))  # type: ignore[misc]
    second.start_node()
    ends = {
        started["instance_id"]: ("exited", 7),
        killed["instance_id"]: ("exited", 128 + signal.SIGKILL),
    }
    until(
        lambda: {row["instance_id"]: (row["state"], row["exit_code"]) for row in second.ps(app.name)} == ends
    )
    for one in (started, killed):
        leftovers.soon_nothing(leftovers.of_instance, node, one["instance_id"])
    assert "the last words" in second.logs(started["instance_id"])


def test_killed_during_a_dump(second: Relume, app: App) -> None:
    app.write(f"ballast = bytearray(os.urandom(1 << 20) * 500)\n{POST}\nserve()")
    second.start_node()
    second.deploy(app.directory)
    started = second.start(app.name)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = in_its_dump(second, app, pool, started, "/post", lambda: _well_begun(second))
        second.kill_node()
        assert get(started, "/count")["hits"] == 1, "it was let go again"
        second.start_node()
        told = answer.result(120)
    assert (told["status"], told["reason"]) == ("created", None)
    assert told["size_bytes"] > 500 << 20
    assert making(second) == []
    assert [row["checkpoint_id"] for row in second.checkpoints(app.name)] == [told["checkpoint_id"]]
    assert second.start(app.name)["restored"]


def _well_begun(relume: Relume) -> bool:
    """A dump has written a megabyte, and is not over."""
    pages = (relume.state / "checkpoints").glob(".making-*/images/pages-*.img")
    with contextlib.suppress(OSError):  # it is over now
        return any(path.stat().st_size > 1 << 20 for path in pages)
    return False


def test_killed_at_any_moment_of_a_checkpoint(second: Relume, app: App) -> None:
    app.write(f"ballast = bytearray(os.urandom(1 << 20) * 100)\n{POST}\nserve()")
    second.start_node()
    second.deploy(app.directory)
    started = second.start(app.name)
    began = time.monotonic()
    assert get(started, "/post")["status"] == "created"
    whole = time.monotonic() - began
    for moment in moments(whole * 1.1, 7):
        for row in second.checkpoints(app.name):
            second.run("checkpoints", "rm", row["checkpoint_id"])
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(get, started, "/post")
            time.sleep(moment)
            second.kill_node()
            second.start_node()
            told = answer.result(120)
        assert told["status"] == "created", (moment, told)
        assert making(second) == []
        (row,) = second.checkpoints(app.name)
        assert (row["checkpoint_id"], row["state"]) == (told["checkpoint_id"], "ready")
        names = {path.name for path in (second.state / "checkpoints" / row["checkpoint_id"]).iterdir()}
        assert not names & {"intent.json", "work"}
    assert get(started, "/count")["hits"] == 1
    assert second.start(app.name)["restored"]


@pytest.mark.parametrize("how", ["boot", "restore"])
def test_killed_at_any_moment_of_a_start(second: Relume, app: App, how: str) -> None:
    app.write(f"{POST}\nserve()")
    second.start_node()
    second.deploy(app.directory)
    began = time.monotonic()
    started = second.start(app.name)
    if how == "restore":
        assert get(started, "/post")["status"] == "created"
        began = time.monotonic()
        assert second.start(app.name)["restored"]
    whole = time.monotonic() - began
    node = leftovers.node_id(second)
    second.stop(app.name)
    outcomes: list[int] = []
    # The later ones only where the machine has become slower than it was, and none has survived so far.
    for moment in [*moments(whole * 1.05, 6), *(whole * 1.5**number for number in range(1, 7))]:
        if len(outcomes) >= 6 and max(outcomes) == 1:
            break
        with starting(second, app):
            time.sleep(moment)
            second.kill_node()
        second.start_node()
        until(lambda: all(row["state"] != "starting" for row in living(second, app.name)))
        alive = living(second, app.name)
        outcomes.append(len(alive))
        for row in alive:
            assert row["state"] == "ready"
            assert row["restored"] is (how == "restore")
            get(row, "/count")
        kept = {row["instance_id"] for row in alive}
        for row in second.ps(app.name):
            if row["instance_id"] not in kept:
                leftovers.soon_nothing(leftovers.of_instance, node, row["instance_id"])
        second.run("stop", app.name)
        _nothing_of_any_instance(second, app, node)
    assert max(outcomes) == 1, outcomes


def _nothing_of_any_instance(relume: Relume, app: App, node: str) -> None:
    for row in relume.ps(app.name):
        leftovers.soon_nothing(leftovers.of_instance, node, row["instance_id"])
    assert living(relume, app.name) == []


def test_told_to_go(second: Relume, app: App) -> None:
    before = leftovers.interfaces()
    app.write("serve()")
    second.start_node()
    second.deploy(app.directory)
    started = second.start(app.name)
    node = leftovers.node_id(second)
    second.kill_node(signal.SIGTERM)
    assert get(started, "/count")["hits"] == 1
    assert not second.state.joinpath("node.sock").exists()
    second.start_node()
    assert [row["url"] for row in living(second, app.name)] == [started["url"]]
    assert get(started, "/count")["hits"] == 2
    second.run("stop", app.name)
    second.kill_node(signal.SIGTERM)
    leftovers.soon_nothing(leftovers.of_node, second, node)

    second.start_node()
    second.kill_node(signal.SIGTERM)  # with a keeper in the making
    leftovers.soon_nothing(leftovers.of_node, second, node)
    assert leftovers.interfaces() <= before


def test_told_to_go_at_any_moment_of_a_start(second: Relume, app: App) -> None:
    app.write("serve()")
    second.start_node()
    second.deploy(app.directory)
    node = leftovers.node_id(second)
    began = time.monotonic()
    second.start(app.name)
    whole = time.monotonic() - began
    second.stop(app.name)
    for moment in moments(whole, 4):
        with starting(second, app):
            time.sleep(moment)
            second.kill_node(signal.SIGTERM)
        second.start_node()
        until(lambda: all(row["state"] == "ready" for row in living(second, app.name)))
        second.run("stop", app.name)
        _nothing_of_any_instance(second, app, node)


def test_stop_right_after_a_start_was_cut_short(relume: Relume, app: App) -> None:
    app.write("time.sleep(0.3)\nserve()")
    relume.deploy(app.directory)
    node = leftovers.node_id(relume)
    began = time.monotonic()
    relume.start(app.name)
    whole = time.monotonic() - began
    relume.stop(app.name)
    for moment in moments(whole, 6):
        with starting(relume, app) as client, starting(relume, app):  # two: one has no spare keeper
            time.sleep(moment)
            client.send_signal(signal.SIGINT)
        relume.run("stop", app.name)
        _nothing_of_any_instance(relume, app, node)


def test_a_start_goes_on_without_its_caller(relume: Relume, app: App) -> None:
    app.write("while not os.path.exists('/persistent-storage/go'): time.sleep(0.01)\nserve()")
    relume.deploy(app.directory)
    with starting(relume, app):
        (row,) = until(lambda: living(relume, app.name))
        assert row["state"] == "starting"
    (relume.state / "persistent" / app.name / "go").touch()
    until(lambda: [row["state"] for row in living(relume, app.name)] == ["ready"])
    (row,) = living(relume, app.name)
    get(row, "/count")


def test_stop_ends_a_start_that_waits_for_its_app(relume: Relume, app: App) -> None:
    app.write("print('never ready', flush=True)\ntime.sleep(1000)")
    relume.deploy(app.directory)
    with starting(relume, app) as client:
        until(lambda: "never ready" in relume.logs(app.name) if living(relume, app.name) else False)
        (row,) = living(relume, app.name)
        relume.run("stop", row["instance_id"])
        assert client.wait(60) != 0
    (row,) = relume.ps(app.name)
    assert row["state"] == "exited"
    leftovers.soon_nothing(leftovers.of_instance, leftovers.node_id(relume), row["instance_id"])


def test_a_killed_keeper_ends_its_instance(relume: Relume, app: App) -> None:
    app.write(f"{SNIPPET}\nserve()")
    relume.deploy(app.directory)
    node = leftovers.node_id(relume)
    for restored in (False, True):
        started = relume.start(app.name)
        assert started["restored"] is restored
        instance = started["instance_id"]
        os.kill(_keeper(node, instance), signal.SIGKILL)
        until(
            lambda instance=instance: instance not in [row["instance_id"] for row in living(relume, app.name)]
        )  # type: ignore[misc]
        (row,) = [row for row in relume.ps(app.name) if row["instance_id"] == instance]
        assert row["state"] == "failed"
        assert f"the keeper of {instance} is gone" in relume.log.read_text()
        leftovers.soon_nothing(leftovers.of_instance, node, instance)
    relume.start(app.name)


def test_a_keeper_that_nobody_can_reach_ends(second: Relume, app: App) -> None:
    app.write("serve()")
    second.start_node()
    second.deploy(app.directory)
    started = second.start(app.name)
    node = leftovers.node_id(second)
    second.kill_node()
    Path("/run/relume", node, started["instance_id"], "keeper.sock").unlink()
    until(lambda: not cgroup.processes(f"/relume/{node}/{started['instance_id']}"))
    with pytest.raises(OSError):
        get(started, "/count")
    second.start_node()
    leftovers.soon_nothing(leftovers.of_instance, node, started["instance_id"])


@pytest.mark.parametrize("restarted", [False, True], ids=["node", "next-node"])
def test_a_keeper_killed_during_a_dump(second: Relume, app: App, restarted: bool) -> None:
    """runc, CRIU and its script would wait for it for ever."""
    app.write(f"ballast = bytearray(os.urandom(1 << 20) * 500)\n{POST}\nserve()")
    second.start_node()
    second.deploy(app.directory)
    started = second.start(app.name)
    node, instance = leftovers.node_id(second), started["instance_id"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = in_its_dump(second, app, pool, started, "/post", lambda: _well_begun(second))
        if restarted:
            second.kill_node()
        os.kill(_keeper(node, instance), signal.SIGKILL)
        if restarted:
            second.start_node()
        with pytest.raises(OSError):
            answer.result(120)
    until(lambda: not living(second, app.name))
    leftovers.soon_nothing(leftovers.of_instance, node, instance)
    leftovers.soon_nothing(_of_the_engine, node, instance)
    until(lambda: making(second) == [])
    assert get(second.start(app.name), "/count")["hits"] == 1


def _of_the_engine(node: str, instance: str) -> list[str]:
    """Processes that runc and CRIU are, or run: what they have in common is the path that the keeper gave them."""
    mark = f"/run/relume/{node}/{instance}/bin".encode()
    return [
        f"{pid}: {leftovers._command(pid)}"
        for pid in leftovers._pids()
        if mark in leftovers._file(pid, "environ")
    ]


def test_a_keeper_that_is_slow_to_answer_is_not_gone(second: Relume, app: App) -> None:
    """Stopped, swapped out, starved: the next node waits for it, and its app runs on meanwhile."""
    app.write("serve()")
    second.start_node()
    second.deploy(app.directory)
    started = second.start(app.name)
    assert get(started, "/count")["hits"] == 1
    node, instance = leftovers.node_id(second), started["instance_id"]
    second.kill_node()
    keeper = _keeper(node, instance)
    os.kill(keeper, signal.SIGSTOP)
    try:
        second.start_node()
        (row,) = living(second, app.name)
        assert (row["instance_id"], row["state"], row["url"]) == (instance, "ready", started["url"])
        time.sleep(1.5)
    finally:
        os.kill(keeper, signal.SIGCONT)
    until(lambda: f"the keeper of {instance} answers" in second.log.read_text())
    assert get(started, "/count")["hits"] == 2
    assert [row["state"] for row in living(second, app.name)] == ["ready"]
    second.run("stop", app.name)
    leftovers.soon_nothing(leftovers.of_instance, node, instance)
    assert [row["state"] for row in second.ps(app.name)] == ["exited"]


def _keeper(node: str, instance: str) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes()
            if b"relume.keeper" in command and f"/run/relume/{node}/{instance}".encode() in command:
                return int(path.parent.name)
    raise AssertionError("no keeper")
