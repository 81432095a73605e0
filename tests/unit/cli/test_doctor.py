"""The doctor finds what is missing, says what to do about it, and leaves nothing behind."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relume.errors import HostError
from relume.linux import cgroup, mounts
from relume.node import doctor
from relume.node.doctor import Finding, examine
from relume.runc import seccomp

Relume = Callable[..., Any]


def found(name: str, state: Path) -> Finding:
    return next(finding for finding in examine(state) if finding.name == name)


def program(path: Path, text: str, status: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


def test_no_seccomp_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by a build otherwise, which is late."""

    def lacking(path: Path) -> dict[str, Any]:
        raise HostError(f"no seccomp profile can be read from {path}", hint="install the package")

    monkeypatch.setattr(seccomp, "_distribution", lacking)
    finding = found("seccomp", tmp_path)
    assert finding.ok is False and finding.remedy == "install the package"


def test_this_machine(tmp_path: Path) -> None:
    """Whatever it has or lacks: every finding is whole, and none of the trials leaves a trace."""
    findings = examine(tmp_path / "state")
    names = [finding.name for finding in findings if not finding.name.startswith("gpu")]
    assert len(set(names)) == len(names) == 19
    assert any(finding.name == "gpu" for finding in findings)
    for finding in findings:
        assert finding.detail
        assert bool(finding.remedy) == (finding.ok is not True), finding
    assert list(tmp_path.iterdir()) == []
    assert mounts.under(tmp_path) == []
    assert not [root for root in cgroup.hierarchies() if (root / f"relume-doctor-{os.getpid()}").exists()]


@pytest.mark.parametrize("version", ["3.17.1", "4.1.1"])
def test_an_old_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("RELUME_CRIU", str(program(tmp_path / "criu", f"Version: {version}\nGitID: x")))
    finding = found("criu", tmp_path)
    assert finding.ok is False
    assert version in finding.detail
    assert "script/bootstrap" in finding.remedy


@pytest.mark.parametrize("version", ["4.2", "4.2.1", "4.10"])
def test_a_criu_that_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("RELUME_CRIU", str(program(tmp_path / "criu", f"Version: {version}\nGitID: x")))
    assert found("criu", tmp_path).ok is True


def test_a_kernel_that_criu_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Error (criu/cr-check.c:1): no such feature\nother"
    monkeypatch.setenv("RELUME_CRIU", str(program(tmp_path / "criu", said, 1)))
    finding = found("criu check", tmp_path)
    assert finding.ok is False
    assert "no such feature" in finding.detail


def test_an_old_runc_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELUME_RUNC", str(program(tmp_path / "runc", "runc version 1.0.0~rc93\ncommit: x")))
    assert found("runc", tmp_path).ok is False
    monkeypatch.setenv("RELUME_RUNC", str(tmp_path / "missing"))
    assert found("runc", tmp_path).ok is False
    monkeypatch.delenv("RELUME_RUNC")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "bootstrap" in found("runc", tmp_path).remedy


def test_a_left_over_of_criu_blocks_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "KDAT_DIRECTORY", tmp_path)
    assert found("criu cache", tmp_path).ok is True
    (tmp_path / "criu.kdat.tmp").touch()
    finding = found("criu cache", tmp_path)
    assert finding.ok is None
    assert finding.remedy.startswith(f"rm {tmp_path}/criu.kdat.tmp")


def test_without_pasta_there_is_no_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = found("network", tmp_path)
    assert finding.ok is None
    assert "no way out" in finding.detail


def test_capabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_effective", lambda: 0)
    assert "CAP_SYS_ADMIN" in found("capabilities", tmp_path).detail
    monkeypatch.setattr(doctor, "_effective", lambda: (1 << 41) - 1)
    assert found("capabilities", tmp_path).ok is True
    assert found("CAP_SYS_RESOURCE", tmp_path).ok is True


@pytest.mark.parametrize(("free", "ok"), [(10**8, False), (10**9, None), (10**11, True)])
def test_room_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, ok: bool | None) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, free))
    assert found("disk", tmp_path).ok is ok


def test_no_user_namespaces_and_no_id_mapped_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mounts, "user_namespace", refused)
    assert "max_user_namespaces" in found("user namespaces", tmp_path).remedy
    assert found("overlay", tmp_path).ok is False
    monkeypatch.setattr(mounts, "user_namespace", lambda *_: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(mounts, "bind_idmapped", refused)
    assert "RELUME_STATE" in found("overlay", tmp_path).remedy
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_without_userfaultfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("relume.linux.userfaultfd.open_userfaultfd", none)
    finding = found("userfaultfd", tmp_path)
    assert (finding.ok, finding.detail) == (None, "the kernel has none")


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (None, 0), (False, 1)])
def test_the_command(
    state: Path, relume: Relume, monkeypatch: pytest.MonkeyPatch, ok: bool | None, status: int
) -> None:
    made = [Finding("disk", True, "much"), Finding("runc", ok, "1.0", "" if ok else "install it")]
    monkeypatch.setattr(doctor, "examine", lambda _: made)
    ran = relume("doctor")
    assert ran.status == status
    assert ran.out.splitlines()[0] == "✓ disk  much"
    assert ("        install it" in ran.out.splitlines()) is (ok is not True)
    assert relume("doctor", "-o", "json").json[1]["ok"] is ok


def test_no_gpu_is_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that are none: the helper finds no GPU, whatever this machine has."""
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (tmp_path / name).touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    finding = found("gpu", tmp_path)
    assert finding.ok is True and finding.detail.startswith("no NVIDIA GPU")
