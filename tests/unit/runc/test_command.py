"""Finding runc and CRIU, and the argument lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.errors import HostError
from relume.runc import Runc, command, find_criu, find_runc


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing on PATH, nothing in the prefix, nothing named."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("RELUME_RUNC", raising=False)
    monkeypatch.delenv("RELUME_CRIU", raising=False)
    monkeypatch.setattr(command, "PREFIX", tmp_path / "opt")
    return tmp_path


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_nothing_installed_says_what_to_do() -> None:
    with pytest.raises(HostError) as runc:
        find_runc()
    with pytest.raises(HostError) as criu:
        find_criu()
    assert "script/bootstrap" in runc.value.hint and "script/bootstrap" in criu.value.hint


def test_the_newest_of_our_own_comes_before_the_systems(empty_machine: Path) -> None:
    """By version, not by letters: 4.10 is newer than 4.9."""
    system = program(empty_machine / "bin/criu")
    assert find_criu() == system
    for version in ("4.9", "4.10", "4.2.1"):
        program(empty_machine / f"opt/criu-{version}/sbin/criu")
    assert find_criu() == empty_machine / "opt/criu-4.10/sbin/criu"


def test_what_is_named_wins(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(empty_machine / "bin/runc")
    monkeypatch.setenv("RELUME_RUNC", "/my/runc")
    monkeypatch.setenv("RELUME_CRIU", "/my/criu")
    assert (find_runc(), find_criu()) == (Path("/my/runc"), Path("/my/criu"))


def test_arguments() -> None:
    runc = Runc(Path("/bin/runc"), Path("/run/relume/n/runc"), Path("/opt/c/sbin/criu"))
    assert runc.argv("kill", "i-1", log=Path("/l")) == (
        "/bin/runc --root /run/relume/n/runc --log /l --log-format json --criu /opt/c/sbin/criu kill i-1".split()
    )
    assert Runc(Path("runc"), Path("/r")).argv("list") == ["runc", "--root", "/r", "list"]


def test_criu_is_first_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """runc from 1.2 on ignores --criu."""
    runc = Runc(Path("/bin/runc"), Path("/r"), Path("/opt/c/sbin/criu"))
    monkeypatch.setenv("PATH", "/a:/b")
    assert runc.environment()["PATH"] == "/opt/c/sbin:/a:/b"
    monkeypatch.delenv("PATH")
    assert runc.environment()["PATH"].startswith("/opt/c/sbin:/")
