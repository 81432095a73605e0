"""The OCI config: what a container must never get, and what limits become."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from relume.runc import Limits, Mount, Spec, seccomp, spec


@pytest.fixture(autouse=True)
def small_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile has tests of its own, and its list may not be installed."""
    monkeypatch.setattr(seccomp, "profile", lambda capabilities: {"for": sorted(capabilities)})


def config(**more: Any) -> dict[str, Any]:
    spec = Spec(
        **{
            "rootfs": Path("/run/r"),
            "argv": ["python3", "-m", "app"],
            "env": {"A": "1", "B": "x=y z"},
            "cwd": "/cortex",
            "hostname": "my-app",
            "cgroup": "/relume/n/i-1",
            "id_base": 524288,
            **more,
        }
    )
    content: dict[str, Any] = json.loads(json.dumps(spec.as_dict()))  # it must be plain JSON
    return content


def namespaces(content: dict[str, Any]) -> set[str]:
    # runc and CRIU make them: a path would be a namespace of another user namespace.
    assert all(set(each) == {"type"} for each in content["linux"]["namespaces"])
    return {each["type"] for each in content["linux"]["namespaces"]}


def test_root_inside_is_nobody_outside() -> None:
    linux = config()["linux"]
    mapping = [{"containerID": 0, "hostID": 524288, "size": 65536}]
    assert linux["uidMappings"] == linux["gidMappings"] == mapping
    assert namespaces({"linux": linux}) == {"pid", "ipc", "uts", "mount", "network", "user", "cgroup"}


def test_a_build_runs_on_the_hosts_network_and_ids() -> None:
    content = config(id_base=None, host_network=True)
    assert "uidMappings" not in content["linux"]
    assert namespaces(content) == {"pid", "ipc", "uts", "mount"}


def test_sysfs_of_a_network_that_is_not_its_own_cannot_be_mounted() -> None:
    """The kernel wants sysfs's network namespace to belong to the mounter's user namespace; a bind it allows."""
    kinds = {}
    for host_network in (False, True):
        mounts = config(host_network=host_network)["mounts"]
        (sys,) = [mount for mount in mounts if mount["destination"] == "/sys"]
        assert "ro" in sys["options"]
        kinds[host_network] = sys["type"]
    assert kinds == {False: "sysfs", True: "bind"}


def test_no_way_up() -> None:
    content = config()
    process = content["process"]
    assert process["noNewPrivileges"] is True
    for kind in ("bounding", "effective", "permitted"):
        assert not {"CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SYS_MODULE"} & set(
            process["capabilities"][kind]
        )
    assert content["linux"]["seccomp"] == {"for": process["capabilities"]["bounding"]}
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(content["linux"]["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(content["linux"]["readonlyPaths"])
    assert content["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]


def test_the_process() -> None:
    process = config(uid=33, gid=34)["process"]
    assert process["user"] == {"uid": 33, "gid": 34}
    assert process["args"] == ["python3", "-m", "app"]
    assert process["env"] == ["A=1", "B=x=y z"]
    assert process["cwd"] == "/cortex"


def test_no_limit_above_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CAP_SYS_RESOURCE runc could not set a higher one, and the container would not start."""
    for hard, soft in ((1024, 1024), (1 << 20, 65536)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, hard=hard: (hard // 2, hard))
        (limit,) = config()["process"]["rlimits"]
        assert (limit["type"], limit["hard"], limit["soft"]) == ("RLIMIT_NOFILE", hard, soft)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(), {"pids": {"limit": 32768}}),
        (Limits(memory=1 << 31, pids=None), {"memory": {"limit": 1 << 31}}),
        (Limits(cpus=2, pids=None), {"cpu": {"quota": 200_000, "period": 100_000, "shares": 2048}}),
        (Limits(cpus=0.5, pids=None), {"cpu": {"quota": 50_000, "period": 100_000, "shares": 512}}),
        # The kernel refuses a quota under 1 ms, and shares under 2 and over 262144.
        (
            Limits(cpus=512, pids=None),
            {"cpu": {"quota": 51_200_000, "period": 100_000, "shares": 262_144}},
        ),
        (Limits(cpus=0.001, pids=None), {"cpu": {"quota": 1000, "period": 100_000, "shares": 2}}),
    ],
)
def test_limits(limits: Limits, expected: dict[str, Any]) -> None:
    resources = config(limits=limits)["linux"]["resources"]
    del resources["devices"]
    assert resources == expected


def test_mounts_of_the_caller_come_last() -> None:
    """So that one below /dev or /sys is not hidden by ours."""
    content = config(mounts=[Mount("/dev/extra", "/host/extra", options=("bind", "ro"))])
    assert content["mounts"][-1] == {
        "destination": "/dev/extra",
        "type": "bind",
        "source": "/host/extra",
        "options": ["bind", "ro"],
    }
    destinations = [mount["destination"] for mount in content["mounts"]]
    assert destinations.index("/dev") < destinations.index("/dev/shm") < destinations.index("/dev/extra")


def test_shared_memory_has_a_bound() -> None:
    (shm,) = [mount for mount in config(shm_bytes=123)["mounts"] if mount["destination"] == "/dev/shm"]
    assert "size=123" in shm["options"] and "mode=1777" in shm["options"]


def test_the_hook_runs_at_boot_and_at_restore() -> None:
    assert "hooks" not in config()
    hook = {"path": "/run/hook", "args": ["/run/hook", "x"], "timeout": 30}
    assert config(create_runtime=("/run/hook", "x"))["hooks"] == {"createRuntime": [hook]}


@pytest.mark.parametrize(("own", "apps"), [("-900\n", 0), ("0\n", 0), ("300\n", 300)])
def test_an_app_is_not_spared_with_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, apps: int
) -> None:
    score = tmp_path / "oom_score_adj"
    score.write_text(own)
    monkeypatch.setattr(spec, "_OOM_SCORE", score)
    assert config()["process"]["oomScoreAdj"] == apps
