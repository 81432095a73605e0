"""The conformance suite: programs that people really run, deployed, checkpointed, restored beside the original.

Each app of tests/apps/ goes one way: deploy; a cold start, during or after which it is checkpointed; three more
starts, which must come from the checkpoint; then all four at once are asked for something that only the memory
from before the checkpoint knows, and must agree. A third of the apps by default, all with ``script/test --all``.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_APPS = Path(__file__).resolve().parents[1] / "apps"
sys.path.insert(0, str(_APPS))

from ask import Ask  # noqa: E402
from harness import HERE, RESTORED, Failed, Node, a_node, load_check, names, record  # noqa: E402

CHECKS = {name: load_check(name) for name in names()}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _patience() -> None:
    """Builds take minutes on a first run: the stacks that pytest prints after 50 s would say nothing."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node() as node:
        yield node


def _parameters() -> list[Any]:
    return [
        pytest.param(name, marks=() if check.FAST else pytest.mark.slow, id=name)
        for name, check in CHECKS.items()
    ]


@pytest.mark.parametrize("name", _parameters())
def test_app(name: str, node: Node) -> None:
    check = CHECKS[name]
    app = f"apps-{name}"
    facts: dict[str, Any] = {"title": check.TITLE, "result": "failed"}
    try:
        node.relume("deploy", HERE / name, "-y", timeout=800)
        if hasattr(check, "UNSUPPORTED"):
            _refused(check, node, app, facts)
        else:
            _restored(check, node, app, facts)
        facts["result"] = facts.get("reason", "ok")
    except BaseException as error:
        facts["reason"] = f"{type(error).__name__}: {error}"[:500]
        raise
    finally:
        record(name, **facts)
        node.forget(app)


def _restored(check: ModuleType, node: Node, app: str, facts: dict[str, Any]) -> None:
    original = node.relume("start", app, timeout=300)
    assert not original["restored"]
    checkpoint = _wait_for_checkpoint(node, original)
    drawn: dict[str, set[object]] = {}

    copies = [node.relume("start", app, timeout=120) for _ in range(3)]
    for copy in copies:
        assert copy["restored"], f"booted instead: {copy['reason']}"
        assert node.instance_log(copy["instance_id"]).splitlines()[0] == RESTORED

    everyone = [original, *copies]
    states = node.states()
    assert [states[each["instance_id"]] for each in everyone] == ["ready"] * 4, states
    memories = []
    for each in everyone:
        try:
            memories.append(check.check(Ask(each["url"], drawn)))
        except Exception as error:
            who = "the original" if each is original else "a copy"
            log = node.instance_log(each["instance_id"])[-3000:]
            raise AssertionError(f"{who} answers wrongly: {type(error).__name__}: {error}\n{log}") from error
    assert all(memory == memories[0] for memory in memories), memories
    assert set(node.states().values()) >= {"ready"}

    node.relume("stop", app)
    cold = node.relume("start", app, "--no-restore", timeout=300)
    assert not cold["restored"]
    facts.update(
        processes=len(checkpoint["processes"]),
        size_bytes=checkpoint["size_bytes"],
        frozen_ms=checkpoint["frozen_ms"],
        cold_s=cold["ready_s"],
        restored_s=statistics.median(copy["ready_s"] for copy in copies),
    )


def _wait_for_checkpoint(node: Node, original: dict[str, Any]) -> dict[str, Any]:
    """``checkpoints inspect`` of the build's checkpoint, as soon as it is there."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        for row in node.relume("checkpoints", "ls"):
            if row["build_id"] == original["build_id"] and row["state"] == "ready":
                return node.relume("checkpoints", "inspect", row["checkpoint_id"])
        log = node.instance_log(original["instance_id"])
        failed = re.search(r"""["']?status["']?[=:]\s?["']failed["'].*""", log)
        if failed or node.states().get(original["instance_id"]) != "ready":
            raise AssertionError(
                f"no checkpoint: {failed[0] if failed else 'the original is gone'}\n{log[-3000:]}"
            )
        time.sleep(0.3)
    raise AssertionError(f"no checkpoint after 180 s\n{node.instance_log(original['instance_id'])[-3000:]}")


def _refused(check: ModuleType, node: Node, app: str, facts: dict[str, Any]) -> None:
    """The checkpoint fails with a reason that names the process, and the app goes on."""
    original = node.relume("start", app, timeout=300)
    answer = None
    deadline = time.monotonic() + 60
    while answer is None and time.monotonic() < deadline:
        time.sleep(0.3)
        for line in node.instance_log(original["instance_id"]).splitlines():
            if line.startswith('{"status"') or '"status":' in line:
                answer = json.loads(line)
    assert answer is not None, node.instance_log(original["instance_id"])
    assert (answer["status"], answer["reason"]) == ("failed", "unsupported"), answer
    assert check.UNSUPPORTED in json.dumps(answer), answer
    check.check(Ask(original["url"]))
    facts["reason"] = f"refused: {answer.get('message') or answer}"[:300]


def test_the_report_has_a_row_for_each_app(tmp_path: Path) -> None:
    """The page is generated: from made-up results it must come out whole, apps without a result included."""
    spec = importlib.util.spec_from_file_location("apps_report", _APPS / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    results = {
        "redis": {
            "title": "Redis",
            "result": "ok",
            "processes": 3,
            "size_bytes": 12_300_000,
            "cold_s": 1.26,
            "restored_s": 0.31,
        }
    }
    page = report.page(results)
    assert "| Redis | 3 | 12 MB | 1.3 s | 0.31 s | ok |" in page
    assert page.count("\n| ") == len(CHECKS) + 1
    assert '| PostgreSQL, filesystem = "all" | | | | | not run |' in page


def test_a_command_that_fails_says_so(node: Node) -> None:
    with pytest.raises(Failed, match="apps-nothing"):
        node.relume("start", "apps-nothing")
