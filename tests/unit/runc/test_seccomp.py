"""The seccomp profile: what answers what, asked the way libseccomp would."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from relume.errors import HostError
from relume.runc import seccomp
from relume.runc.spec import DEFAULT_CAPABILITIES

ENOSYS, EPERM, EINVAL = 38, 1, 22
CLONE_NEWUSER, CLONE_THREAD, CLONE_VM = 0x10000000, 0x10000, 0x100
NAMESPACES = {"mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
              "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
SYS_ADMIN = DEFAULT_CAPABILITIES | {"CAP_SYS_ADMIN"}

COMPARE = {
    "SCMP_CMP_EQ": lambda got, one, two: got == one,
    "SCMP_CMP_NE": lambda got, one, two: got != one,
    "SCMP_CMP_LT": lambda got, one, two: got < one,
    "SCMP_CMP_GT": lambda got, one, two: got > one,
    "SCMP_CMP_MASKED_EQ": lambda got, one, two: got & one == two,
}


def distribution(tmp_path: Path) -> Path:
    """A list in the distribution's form, small and with the traps of the real one."""
    allow = [
        "read",
        "madvise",
        "process_madvise",
        "clone",
        "clone3",
        "unshare",
        "mount",
        "io_uring_setup",
        "keyctl",
        "setns",
    ]
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        ],
        "syscalls": [
            {"names": ["userfaultfd", "vmsplice"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
            {"names": allow, "action": "SCMP_ACT_ALLOW"},
            {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64"]}},
            {"names": ["cacheflush"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
            {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
            {"names": ["reboot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_BOOT"]}},
            {
                "names": ["reboot"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": 1,
                "excludes": {"caps": ["CAP_SYS_BOOT"]},
            },
            {
                "names": ["personality"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": 8, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
            },
        ],
    }
    path = tmp_path / "seccomp.json"
    path.write_text(json.dumps(profile))
    return path


@pytest.fixture(params=["ours", "the distribution's"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small list, and the machine's own where it is installed (script/bootstrap does)."""
    if request.param == "ours" or not seccomp.PROFILE.exists():
        return distribution(tmp_path)
    return seccomp.PROFILE


def ask(profile: dict[str, Any], call: str, *args: int) -> str | int:
    """ "allow", or the errno. Rules for one call must agree, or the kernel's order would matter."""
    found: set[str | int] = set()
    for rule in profile["syscalls"]:
        if call not in rule["names"]:
            continue
        if all(
            COMPARE[arg["op"]](args[arg["index"]], arg["value"], arg["valueTwo"])
            for arg in rule.get("args", ())
        ):
            found.add("allow" if rule["action"] == "SCMP_ACT_ALLOW" else rule["errnoRet"])
    assert len(found) <= 1, (call, found)
    return found.pop() if found else profile["defaultErrnoRet"]


@pytest.mark.parametrize("capabilities", [DEFAULT_CAPABILITIES, SYS_ADMIN], ids=["default", "sys_admin"])
@pytest.mark.parametrize("call", ["io_uring_setup", "io_uring_enter", "io_uring_register"])
def test_no_rings(path: Path, capabilities: frozenset[str], call: str) -> None:
    """ENOSYS, not EPERM: that is what libuv and uvloop take for "an old kernel" and fall back."""
    assert ask(seccomp.profile(capabilities, path), call) == ENOSYS


@pytest.mark.parametrize("capabilities", [DEFAULT_CAPABILITIES, SYS_ADMIN], ids=["default", "sys_admin"])
def test_no_userfaultfd_for_guests(path: Path, capabilities: frozenset[str]) -> None:
    assert ask(seccomp.profile(capabilities, path), "userfaultfd") == EPERM


def test_no_guard_pages_that_a_pager_would_not_hear_of(path: Path) -> None:
    profile = seccomp.profile(DEFAULT_CAPABILITIES, path)
    for advice in (0, 4, 8, 18, 25, 100, 101, 104, 0xFFFFFFFF):
        assert ask(profile, "madvise", 0, 4096, advice) == "allow"
        assert ask(profile, "process_madvise", 3, 0, 1, advice) == "allow"
    for advice in (102, 103):
        assert ask(profile, "madvise", 0, 4096, advice) == EINVAL
        assert ask(profile, "process_madvise", 3, 0, 1, advice) == EINVAL


@pytest.mark.parametrize("flag", NAMESPACES.values(), ids=NAMESPACES)
def test_no_new_namespace_by_clone(path: Path, flag: int) -> None:
    profile = seccomp.profile(DEFAULT_CAPABILITIES, path)
    assert ask(profile, "clone", flag) == ENOSYS
    assert ask(profile, "clone", flag | CLONE_VM | 17) == ENOSYS
    assert ask(seccomp.profile(SYS_ADMIN, path), "clone", flag) == "allow"


def test_threads_and_forks(path: Path) -> None:
    profile = seccomp.profile(DEFAULT_CAPABILITIES, path)
    assert ask(profile, "clone", CLONE_VM | CLONE_THREAD | 0x3D0F00) == "allow"
    assert ask(profile, "clone", 17) == "allow"
    assert ask(profile, "clone3") == ENOSYS  # so that libc uses clone, whose flags a filter sees


@pytest.mark.parametrize("call", ["unshare", "mount", "setns", "keyctl", "bpf", "open_tree", "pivot_root"])
def test_what_needs_sys_admin(path: Path, call: str) -> None:
    assert ask(seccomp.profile(DEFAULT_CAPABILITIES, path), call) == EPERM
    assert ask(seccomp.profile(SYS_ADMIN, path), call) == "allow"


def test_capabilities_and_arguments(path: Path) -> None:
    profile = seccomp.profile(DEFAULT_CAPABILITIES, path)
    assert ask(profile, "read") == "allow"
    assert ask(profile, "vmsplice") == EPERM
    assert ask(profile, "chroot") == "allow"
    assert ask(seccomp.profile(frozenset(), path), "chroot") in (EPERM, ENOSYS)
    assert ask(profile, "personality", 8) == "allow"
    assert ask(profile, "personality", 0x0040000) == ENOSYS  # ADDR_NO_RANDOMIZE's neighbour
    assert ask(profile, "a_call_of_next_year") == ENOSYS


@pytest.mark.parametrize(
    ("machine", "here", "there", "architecture"),
    [
        ("x86_64", "arch_prctl", "cacheflush", "SCMP_ARCH_X86_64"),
        ("aarch64", "cacheflush", "arch_prctl", "SCMP_ARCH_AARCH64"),
    ],
)
def test_architectures(
    path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, here: str, there: str, architecture: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    profile = seccomp.profile(DEFAULT_CAPABILITIES, path)
    assert ask(profile, here) == "allow"
    assert ask(profile, there) == ENOSYS
    assert profile["architectures"][0] == architecture


def test_a_machine_without_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError) as missing:
        seccomp.profile(DEFAULT_CAPABILITIES, tmp_path / "none.json")
    assert "none.json" in missing.value.message and "golang-github-containers-common" in missing.value.hint
    (tmp_path / "torn.json").write_text('{"syscalls": [')
    with pytest.raises(HostError, match=r"torn\.json"):
        seccomp.profile(DEFAULT_CAPABILITIES, tmp_path / "torn.json")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(HostError, match="riscv64"):
        seccomp.profile(DEFAULT_CAPABILITIES, distribution(tmp_path))
