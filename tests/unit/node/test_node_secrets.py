"""Secrets: one 0600 file per app, whole or not changed at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relume.errors import BadRequest
from relume.node.secrets import Secrets

values = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.dictionaries(values.filter(lambda name: name and "=" not in name), values, max_size=4))
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, content: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("secrets") / "app.json"
    Secrets(path).set(content)
    assert Secrets(path).all() == content


def test_set_adds_and_replaces_and_remove_says_whether(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path / "app.json")
    assert secrets.all() == {}
    assert not secrets.remove("A")
    secrets.set({"A": "1", "B": "2"})
    secrets.set({"B": "3"})
    assert secrets.all() == {"A": "1", "B": "3"}
    assert secrets.remove("A") and not secrets.remove("A")
    assert secrets.all() == {"B": "3"}
    secrets.clear()
    secrets.clear()
    assert secrets.all() == {}


def test_only_root_reads_them_whatever_the_umask(tmp_path: Path) -> None:
    Secrets(tmp_path / "app.json").set({"A": "1"})
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


@pytest.mark.parametrize(("name", "value"), [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "x\0")])
def test_what_no_environment_can_hold(tmp_path: Path, name: str, value: str) -> None:
    secrets = Secrets(tmp_path / "app.json")
    secrets.set({"KEPT": "1"})
    with pytest.raises(BadRequest):
        secrets.set({"GOOD": "2", name: value})
    assert secrets.all() == {"KEPT": "1"}


def test_what_a_kill_left_is_cleared_too(tmp_path: Path) -> None:
    (tmp_path / "app.tmp").write_text('{"A": "1"}')
    Secrets(tmp_path / "app.json").clear()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    """/dev/full in the temporary's place answers ENOSPC (full(4))."""
    secrets = Secrets(tmp_path / "app.json")
    secrets.set({"KEPT": "1"})
    (tmp_path / "app.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError):
        secrets.set({"LOST": "2"})
    assert secrets.all() == {"KEPT": "1"}


def test_two_apps_with_alike_names_share_no_temporary(tmp_path: Path) -> None:
    """`a.b` and `a.c`: a suffix that was cut off once too often would make them meet."""
    for name in ("a.b", "a.c"):
        Secrets(tmp_path / f"{name}.json").set({"NAME": name})
    assert [Secrets(tmp_path / f"{name}.json").all()["NAME"] for name in ("a.b", "a.c")] == ["a.b", "a.c"]
