"""The seccomp profile: what Docker lets a container do by default, and four things less.

The list of harmless calls is the distribution's (package golang-github-containers-common), because a list
kept by a distribution knows next year's calls; it is the profile of podman, and is narrowed here to Docker's
rules: no namespaces, mounts or kernel keyrings without CAP_SYS_ADMIN. On top of that

- io_uring_* answer ENOSYS: CRIU cannot save a ring, and libuv, uvloop and others fall back on epoll;
- userfaultfd answers EPERM: the machine-wide sysctl that paging into a user namespace needs must not open
  it to guests;
- MADV_GUARD_INSTALL and MADV_GUARD_REMOVE answer EINVAL, as before Linux 6.13: they discard pages and tell no
  userfaultfd, and UFFDIO_COPY overwrites a guard, so what a copy gave up would come back. libc and allocators fall
  back on mprotect.
"""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

from relume.errors import HostError

PROFILE = Path("/usr/share/containers/seccomp.json")

_ENOSYS = 38
_EPERM = 1
_EINVAL = 22

_NO_SUCH_CALL = frozenset({"io_uring_setup", "io_uring_enter", "io_uring_register"})
_NEEDS_SYS_ADMIN = frozenset(
    """add_key bpf fanotify_init fsconfig fsmount fsopen fspick keyctl lookup_dcookie mount mount_setattr
    move_mount open_tree perf_event_open pivot_root quotactl quotactl_fd request_key setdomainname sethostname
    setns swapoff swapon syslog umount umount2 unshare vhangup""".split()
)
_SPECIAL = frozenset({"clone", "clone3"})
_ADVICE = {"madvise": 2, "process_madvise": 3}
"""Calls that take advice on memory: the number of that argument."""

_OURS = _NO_SUCH_CALL | _NEEDS_SYS_ADMIN | _SPECIAL | {"userfaultfd"} | _ADVICE.keys()

_GUARD_INSTALL, _GUARD_REMOVE = 102, 103

# Flags that make a namespace (clone(2)): NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_NAMESPACE_FLAGS = 0x7E020000

_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}


@cache
def _distribution(path: Path) -> dict[str, Any]:
    try:
        profile: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HostError(
            f"no seccomp profile can be read from {path}: {error}",
            hint="install the package golang-github-containers-common (script/bootstrap does)",
        ) from None
    return profile


def profile(capabilities: frozenset[str], path: Path = PROFILE) -> dict[str, Any]:
    """The ``linux.seccomp`` object of an OCI config for a process with these capabilities."""
    source = _distribution(path)
    machine = platform.machine()
    arch = _ARCHES.get(machine, machine)
    rules: list[dict[str, Any]] = []
    for entry in source["syscalls"]:
        if not _applies(entry, arch, capabilities):
            continue
        names = [name for name in entry["names"] if name not in _OURS]
        if names:
            rules.append(_rule(names, entry["action"], entry.get("errnoRet"), entry.get("args")))
    rules.append(_rule(sorted(_NO_SUCH_CALL), "SCMP_ACT_ERRNO", _ENOSYS))
    rules.append(_rule(["userfaultfd"], "SCMP_ACT_ERRNO", _EPERM))
    for name, index in _ADVICE.items():
        rules += _without_guards(name, index)
    if "CAP_SYS_ADMIN" in capabilities:
        rules.append(_rule(sorted(_NEEDS_SYS_ADMIN | _SPECIAL), "SCMP_ACT_ALLOW"))
    else:
        rules.append(_rule(sorted(_NEEDS_SYS_ADMIN), "SCMP_ACT_ERRNO", _EPERM))
        plain = {"index": 0, "value": _NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
        rules.append(_rule(["clone"], "SCMP_ACT_ALLOW", args=[plain]))
        # The flags of clone3 lie in memory, where a filter cannot look: ENOSYS makes libc use clone.
        rules.append(_rule(["clone3"], "SCMP_ACT_ERRNO", _ENOSYS))
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _ENOSYS,
        "architectures": _architectures(source, arch),
        "syscalls": rules,
    }


def _without_guards(name: str, index: int) -> list[dict[str, Any]]:
    def when(comparison: str, value: int) -> list[dict[str, Any]]:
        return [{"index": index, "value": value, "valueTwo": 0, "op": comparison}]

    return [
        _rule([name], "SCMP_ACT_ALLOW", args=when("SCMP_CMP_LT", _GUARD_INSTALL)),
        _rule([name], "SCMP_ACT_ALLOW", args=when("SCMP_CMP_GT", _GUARD_REMOVE)),
        _rule([name], "SCMP_ACT_ERRNO", _EINVAL, when("SCMP_CMP_EQ", _GUARD_INSTALL)),
        _rule([name], "SCMP_ACT_ERRNO", _EINVAL, when("SCMP_CMP_EQ", _GUARD_REMOVE)),
    ]


def _applies(entry: dict[str, Any], arch: str, capabilities: frozenset[str]) -> bool:
    includes, excludes = entry.get("includes") or {}, entry.get("excludes") or {}
    if includes.get("arches") and arch not in includes["arches"]:
        return False
    if not set(includes.get("caps") or ()) <= capabilities:
        return False
    return not (set(excludes.get("caps") or ()) & capabilities or arch in (excludes.get("arches") or ()))


def _architectures(source: dict[str, Any], arch: str) -> list[str]:
    wanted = {"amd64": "SCMP_ARCH_X86_64", "arm64": "SCMP_ARCH_AARCH64"}.get(arch)
    for entry in source["archMap"]:
        if entry["architecture"] == wanted:
            return [entry["architecture"], *entry["subArchitectures"]]
    raise HostError(f"no seccomp profile for {arch}", hint="relume runs on x86_64 and aarch64")


def _rule(
    names: list[str], action: str, errno: int | None = None, args: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": action}
    if errno is not None and action == "SCMP_ACT_ERRNO":
        rule["errnoRet"] = errno
    if args:
        rule["args"] = args
    return rule
