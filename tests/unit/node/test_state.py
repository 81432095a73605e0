"""What a node remembers, through restarts, kills and a second node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relume.errors import Conflict, NotFound
from relume.node.state import State
from relume.runc.spec import ID_COUNT


def save(state: State, number: int, app: str = "a", /, **more: Any) -> str:
    instance_id = f"i-{number}"
    content: dict[str, Any] = {"build_id": "b", "state": "starting", "facts": {}} | more
    state.save_instance(instance_id, app=app, started_at=float(number), **content)
    return instance_id


def test_a_node_keeps_its_id_and_two_have_two(tmp_path: Path) -> None:
    ids = []
    for directory in ("one", "one", "two"):
        state = State(tmp_path / directory)
        ids += [state.node_id(), state.node_id()]
        state.close()
    assert len(set(ids[:4])) == 1 and ids[4] == ids[5] != ids[0]


def test_a_second_node_is_refused(tmp_path: Path) -> None:
    """Also one in the same process, and only as long as the first one lives."""
    state = State(tmp_path)
    with pytest.raises(Conflict) as refused:
        State(tmp_path)
    assert str(tmp_path) in refused.value.message and "RELUME_STATE" in refused.value.hint
    code = f"from relume.node.state import State; from pathlib import Path; State(Path({str(tmp_path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "Conflict" in other.stderr
    state.close()
    State(tmp_path).close()


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    State(tmp_path / "state").close()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "state").iterdir())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.sampled_from("abcdefgh")), max_size=30))
def test_no_two_apps_share_an_id(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    """Whatever comes and goes: ranges never overlap, stay above the host's users, and an app keeps its own."""
    state = State(tmp_path_factory.mktemp("state"))
    bases: dict[str, int] = {}
    for step, name in steps:
        if step == "add":
            base = state.ensure_app(name).id_base
            assert bases.setdefault(name, base) == base
        else:
            state.remove_app(name)
            bases.pop(name, None)
    assert {app.name: app.id_base for app in state.apps()} == bases
    assert len(set(bases.values())) == len(bases)
    assert all(base % ID_COUNT == 0 and base >= 8 * ID_COUNT for base in bases.values())
    state.close()


def test_apps(tmp_path: Path) -> None:
    state = State(tmp_path)
    with pytest.raises(NotFound, match="'a'"):
        state.app("a")
    made = state.ensure_app("a")
    assert made.build_id is None
    state.set_build("a", "b1", "/src/a")
    assert (state.ensure_app("a").build_id, state.app("a").directory) == ("b1", "/src/a")
    save(state, 1)
    state.remove_app("a")
    assert state.apps() == [] and state.instances() == []
    state.close()


def test_instances_are_found_again(tmp_path: Path) -> None:
    state = State(tmp_path)
    save(state, 2)
    save(state, 1, facts={"port": 1})
    save(state, 1, state="ready", facts={"port": 8080, "container": {"x": [1, None]}})
    state.end_instance("i-2", "exited", 3)
    state.close()
    state = State(tmp_path)
    first, second = state.instances()
    assert (first["instance_id"], first["state"], first["ended_at"]) == ("i-1", "ready", None)
    assert first["facts"] == {"port": 8080, "container": {"x": [1, None]}}
    assert second["state"] == "exited" and second["ended_at"] is not None
    assert second["facts"]["exit_code"] == 3
    state.forget_instance("i-2")
    assert [row["instance_id"] for row in state.instances()] == ["i-1"]
    state.close()


def test_only_the_oldest_ended_ones_are_pruned(tmp_path: Path) -> None:
    state = State(tmp_path)
    for number in range(6):
        save(state, number)
        if number != 0:
            state.end_instance(f"i-{number}", "exited", None)
    save(state, 9, "other")
    state.end_instance("i-9", "exited", None)
    assert state.prunable("a", 3) == ["i-2", "i-1"]  # i-0 is the oldest, and lives
    assert state.prunable("a", 9) == []
    state.close()


def test_remakes_are_counted_for_each_build_and_through_restarts(tmp_path: Path) -> None:
    counts = []
    for _ in range(2):
        state = State(tmp_path)
        counts += [state.count_remake("b1"), state.count_remake("b1"), state.count_remake("b2")]
        state.close()
    assert counts == [1, 2, 1, 3, 4, 2]


def test_kill_in_the_middle(tmp_path: Path) -> None:
    """kill -9 at any moment: everything that was told as done is there, the lock is free, no id is shared."""
    code = f"""
import itertools
from pathlib import Path
from relume.node.state import State
state = State(Path({str(tmp_path)!r}))
for number in itertools.count():
    state.ensure_app(f"app-{{number}}")
    state.save_instance(f"i-{{number}}", app=f"app-{{number}}", build_id="b", state="ready",
                        started_at=number, facts={{"number": number}})
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 100:
                break
        os.kill(child.pid, signal.SIGKILL)
        told = 100 + len(child.stdout.read().split())
    state = State(tmp_path)
    rows = state.instances()
    assert len(rows) - 1 in (told, told + 1)
    assert [row["facts"]["number"] for row in rows] == list(range(len(rows)))
    bases = [app.id_base for app in state.apps()]
    assert len(set(bases)) == len(bases) >= len(rows)
    state.close()
