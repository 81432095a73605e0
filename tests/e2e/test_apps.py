"""The conformance suite: programs that people really run, deployed, checkpointed, restored beside the original.

Each app of tests/apps/ goes one way: deploy; a cold start, during or after which it is checkpointed; three more
starts, which must come from the checkpoint; then all four at once are asked for something that only the memory
from before the checkpoint knows, and must agree. A third of the apps by default, all with ``script/test --all``.

The node and its state are the suite's own, and temporary; ``RELUME_APPS_STATE`` names a folder that keeps the
builds for the next run.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness import Failed, Relume, share_builds, until

_APPS = Path(__file__).resolve().parents[1] / "apps"
sys.path.insert(0, str(_APPS))

from ask import Ask  # noqa: E402
from suite import HERE, load_check, names, record  # noqa: E402

CHECKS = {name: load_check(name) for name in names()}

#: The line that a restored instance's log begins with, as documented.
RESTORED = "CEREBRIUM_RESTORED: container restored from checkpoint"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _patience() -> None:
    """Builds take minutes on a first run: the stacks that pytest prints after a while would say nothing."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Relume]:
    kept = os.environ.get("RELUME_APPS_STATE")
    state = Path(kept or tempfile.mkdtemp(prefix="relume-apps-", dir="/var/tmp"))
    state.mkdir(parents=True, exist_ok=True)
    if not kept:
        share_builds(request.getfixturevalue("relume"), state)
    node = Relume(state)
    node.start_node()
    yield node
    node.kill_node(signal.SIGTERM)
    if not kept:
        shutil.rmtree(state)
        node.log.unlink()


def _parameters() -> list[Any]:
    return [
        pytest.param(name, marks=() if check.FAST else pytest.mark.slow, id=name)
        for name, check in CHECKS.items()
    ]


@pytest.mark.parametrize("name", _parameters())
def test_app(name: str, node: Relume) -> None:
    check = CHECKS[name]
    app = f"apps-{name}"
    facts: dict[str, Any] = {"title": check.TITLE}
    try:
        node.json("deploy", str(HERE / name), "-y", timeout=800)
        facts |= _refused(check, node, app) if hasattr(check, "UNSUPPORTED") else _restored(check, node, app)
    except BaseException as error:
        facts["result"] = f"failed: {type(error).__name__}: {error}"[:500]
        raise
    finally:
        record(name, facts)
        node.stop(app)
        node.remove(app)


def _restored(check: ModuleType, node: Relume, app: str) -> dict[str, Any]:
    """The way of an app that works; what is known of it afterwards."""
    original = node.start(app)
    assert not original["restored"]
    checkpoint = until(lambda: _checkpoint(node, original), 180, "no checkpoint after 180 s")

    copies = [node.start(app) for _ in range(3)]
    for copy in copies:
        assert copy["restored"], f"booted instead: {copy['reason']}"
        assert node.logs(copy["instance_id"]).splitlines()[0] == RESTORED
    assert [row["state"] for row in node.ps(app)] == ["ready"] * 4

    drawn: dict[str, set[object]] = {}
    memories = []
    for each in (original, *copies):
        try:
            memories.append(check.check(Ask(each["url"], drawn)))
        except Exception as error:
            who = "the original" if each is original else "a copy"
            log = node.logs(each["instance_id"])[-3000:]
            raise AssertionError(f"{who} answers wrongly: {type(error).__name__}: {error}\n{log}") from error
    assert all(memory == memories[0] for memory in memories), memories
    assert [row["state"] for row in node.ps(app)] == ["ready"] * 4, "one did not outlive its questions"

    node.stop(app)
    cold = node.start(app, "--no-restore")
    assert not cold["restored"]
    return {
        "result": "ok",
        "processes": len(checkpoint["processes"]),
        "size_bytes": checkpoint["size_bytes"],
        "frozen_ms": checkpoint["frozen_ms"],
        "cold_s": cold["ready_s"],
        "restored_s": statistics.median(copy["ready_s"] for copy in copies),
    }


def _checkpoint(node: Relume, original: dict[str, Any]) -> dict[str, Any] | None:
    """``checkpoints inspect`` of the build's checkpoint, or None while there is none. A failed one is an error."""
    for row in node.checkpoints(original["app"]):
        if row["build_id"] == original["build_id"] and row["state"] == "ready":
            inspected: dict[str, Any] = node.json("checkpoints", "inspect", row["checkpoint_id"])
            return inspected
    log = node.logs(original["instance_id"])
    failed = re.search(r"""["']?status["']?[=:]\s?["']failed["'].*""", log)
    assert not failed, f"the checkpoint failed: {failed[0]}\n{log[-3000:]}"
    assert original["instance_id"] in {row["instance_id"] for row in node.ps(original["app"])}, log[-3000:]
    time.sleep(0.2)
    return None


def _refused(check: ModuleType, node: Relume, app: str) -> dict[str, Any]:
    """The checkpoint fails with a reason that names the process, and the app goes on."""
    original = node.start(app)
    until(lambda: '"status"' in node.logs(original["instance_id"]), 60, "the request is not answered")
    answer = node.answer_of_post(original["instance_id"])
    assert (answer["status"], answer["reason"]) == ("failed", "unsupported"), answer
    assert check.UNSUPPORTED in json.dumps(answer), answer
    check.check(Ask(original["url"]))
    return {"result": f"refused: {answer['message']}"}


@pytest.mark.slow
def test_copies_draw_the_same_unless_they_are_reseeded(node: Relume) -> None:
    """The control of what the checks of the runner's apps rely on, and of what docs/apps.md says of OpenSSL."""
    app = "apps-functions"
    node.json("deploy", str(HERE / "functions"), "-y", timeout=800)
    try:
        original = node.start(app, "-e", "RELUME_RESEED=0")
        until(lambda: _checkpoint(node, original), 180, "no checkpoint after 180 s")
        draws = [Ask(each["url"]).json("/draw", {})["result"] for each in (original, node.start(app))]
        assert draws[0] == draws[1]
    finally:
        node.stop(app)
        node.remove(app)


#: How the request ends in a copy, by the client that makes it: each has a connection error of its own.
CLIENTS = {
    "urllib": "http.client.RemoteDisconnected: ",
    "requests": "requests.exceptions.ConnectionError: ('Connection aborted.', RemoteDisconnected(",
    "requests_kept_alive": "requests.exceptions.ConnectionError: ('Connection aborted.', RemoteDisconnected(",
    "httpx": "httpx.RemoteProtocolError: Server disconnected",
    "httpx_async": "httpx.RemoteProtocolError: Server disconnected",
    "aiohttp": "aiohttp.client_exceptions.ServerDisconnectedError: ",
    "curl": "builtins.RuntimeError: status 52: curl: (52) Empty reply from server",
    "node_fetch": "builtins.RuntimeError: status 7: TypeError UND_ERR_SOCKET",
}


@pytest.mark.slow
def test_the_request_ends_in_a_copy_as_each_client_says_it(node: Relume) -> None:
    app = "apps-http-clients"
    node.json("deploy", str(HERE / "http-clients"), "-y", timeout=800)
    try:
        for client, expected in CLIENTS.items():
            original = node.start(app, "-e", f"CLIENT={client}")
            checkpoint = until(lambda original=original: _checkpoint(node, original), 60, client)
            copy = node.start(app)
            assert copy["restored"], (client, copy["reason"])
            ended = until(lambda copy=copy: Ask(copy["url"]).json("/"), 10, f"{client} hangs in the copy")
            assert ended["error"].startswith(expected), (client, ended)
            assert 0 <= ended["ended_after_s"] < 1, (client, ended)
            assert Ask(original["url"]).json("/")["answer"]["status"] == "created", client
            node.stop(app)
            node.run("checkpoints", "rm", checkpoint["checkpoint_id"])
    finally:
        node.stop(app)
        node.remove(app)


def test_a_main_py_that_fails_at_import(node: Relume, tmp_path: Path) -> None:
    """`start` fails with the app's traceback, and nobody tries again."""
    (tmp_path / "cerebrium.toml").write_text('[cerebrium.deployment]\nname = "apps-broken"\n')
    (tmp_path / "main.py").write_text("def predict():\n    return 1\n\nraise RuntimeError('no weights')\n")
    node.json("deploy", str(tmp_path), "-y", timeout=800)
    try:
        with pytest.raises(Failed) as caught:
            node.start("apps-broken")
        assert caught.value.error["code"] == "start_failed"
        assert "RuntimeError: no weights" in json.dumps(caught.value.error)
        time.sleep(2)
        assert len(node.ps("apps-broken")) <= 1, "a restart storm"
        assert all(row["state"] in ("failed", "exited") for row in node.ps("apps-broken"))
    finally:
        node.remove("apps-broken")


def test_the_report_has_a_row_for_each_app() -> None:
    """The page is generated: from made-up results it must come out whole, apps without a result included."""
    spec = importlib.util.spec_from_file_location("apps_report", _APPS / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    redis = {"result": "ok", "processes": 3, "size_bytes": 12_300_000, "cold_s": 1.26, "restored_s": 0.31}
    page = report.page({"redis": redis})
    assert f"| {CHECKS['redis'].TITLE} | 3 | 12 MB | 1.3 s | 0.31 s | ok |" in page
    assert page.count("\n| ") == len(CHECKS) + 1
    assert f"| {CHECKS['postgresql'].TITLE} | | | | | not run |" in page


def test_an_app_that_is_not_there(node: Relume) -> None:
    with pytest.raises(Failed, match="apps-nothing"):
        node.start("apps-nothing")
