"""A pager, its holder, or both are killed before the memory is in: no wrong answer, and another takes the place."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from harness import SNIPPET, App, Relume, get, until
from relume.linux import cgroup

# Every page has its own number in it; "wrong" counts those that have not, and never goes down again.
HOLD = f"""
SIZE = 64 << 20
blob = bytearray(SIZE)
for at in range(0, SIZE, 4096):
    blob[at : at + 8] = (at + 1).to_bytes(8, "little")
WRONG = []
def look(pause):
    for at in range(0, SIZE, 4096):
        if int.from_bytes(blob[at : at + 8], "little") != at + 1:
            open("/persistent-storage/wrong", "w").write(str(at))
            WRONG.append(at)
        if at % (1 << 20) == 0:
            time.sleep(float(pause))
    return len(WRONG)
ACTIONS["look"] = look
{SNIPPET}
serve()
"""


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def named(name: str, pids: list[int]) -> int:
    return next(pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == name)


def paging(instance: str) -> tuple[int, int]:
    """The pids of an instance's holder and pager."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            if instance.encode() in (entry / "cmdline").read_bytes():
                holder = named("relume-holder", children(int(entry.name)))
                return holder, named("relume-pager", children(holder))
    raise AssertionError(f"{instance} has no pager")


def test_killed_while_no_node_runs(relume: Relume, app: App) -> None:
    """The next run of the node hears of it from the keeper."""
    app.write(HOLD, extra='[relume.checkpoint]\nfill = "demand"\n')
    relume.deploy(app.directory)
    relume.start(app.name)
    copy = relume.start(app.name, "--env", "COLOUR=blue")
    _, pager = paging(copy["instance_id"])
    relume.kill_node()
    os.kill(pager, signal.SIGKILL)
    relume.start_node()
    (other,) = until(lambda: _successor(relume, app, copy), what="nobody took its place")
    assert get(other, "/env")["COLOUR"] == "blue"
    assert get(other, "/look/0") == 0
    assert f"paging of {copy['instance_id']} failed: " in relume.log.read_text()


def _successor(relume: Relume, app: App, copy: dict[str, Any]) -> list[dict[str, Any]]:
    ready = [row for row in relume.ps(app.name) if row["state"] == "ready"]
    return [row for row in ready if row["restored"] and row["instance_id"] != copy["instance_id"]]


@pytest.mark.parametrize("victims", ["pager", "holder", "both"])
def test_killed_before_the_memory_is_in(relume: Relume, app: App, victims: str) -> None:
    app.write(HOLD, extra='[relume.checkpoint]\nfill = "demand"\n')
    relume.deploy(app.directory)
    relume.start(app.name)
    copy = relume.start(app.name, "--env", "COLOUR=blue")
    assert copy["memory"] == "paged"
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            answers.append(get(copy, "/look/0.02"))

    asking = threading.Thread(target=ask)
    asking.start()
    holder, pager = paging(copy["instance_id"])
    for pid in {"pager": [pager], "holder": [holder], "both": [holder, pager]}[victims]:
        os.kill(pid, signal.SIGKILL)
    group = f"/relume/{relume.json('node', 'status')['node_id']}/{copy['instance_id']}"
    until(lambda: not cgroup.processes(group), what="the instance runs on")
    asking.join()
    assert answers in ([], [0])
    assert not (relume.state / "persistent" / app.name / "wrong").exists()
    (other,) = until(lambda: _successor(relume, app, copy), what="nobody took its place")
    assert get(other, "/env")["COLOUR"] == "blue"
    assert get(other, "/look/0") == 0
    reason = "the pager was killed by signal 9" if victims == "pager" else "holder was killed by signal 9"
    assert f"paging of {copy['instance_id']} failed: " in (log := relume.log.read_text())
    assert reason in log
    (checkpoint,) = relume.checkpoints(app.name)
    assert checkpoint["state"] == "ready", "once is no reason to give it up"
