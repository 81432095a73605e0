"""CDI files as nvidia-ctk makes them, found as podman does, turned into edits of an OCI config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from relume.errors import GpuUnavailable
from relume.gpu import cdi
from relume.gpu.nvml import Gpu

GPUS = [
    Gpu(index, f"GPU-{index}", "NVIDIA L4", 24 << 30, 0, mig=False, persistence=True) for index in range(2)
]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libcuda.so.580.65.06"
    path.touch()
    return path


@pytest.fixture
def spec(library: Path) -> dict[str, Any]:
    """The shape of `nvidia-ctk cdi generate`, with /dev/null and /dev/zero in the place of GPUs."""
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}},
            {"name": "GPU-1", "containerEdits": {"deviceNodes": [{"path": "/dev/zero", "permissions": "rw"}]}},
            {"name": "all", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}, {"path": "/dev/zero"}]}},
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": "/dev/nvidiactl", "hostPath": "/dev/full"}],
            "mounts": [
                {
                    "hostPath": str(library),
                    "containerPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.580.65.06",
                    "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"],
                }
            ],
            "hooks": [
                {
                    "hookName": "createContainer",
                    "path": "/usr/bin/nvidia-cdi-hook",
                    "args": [
                        "nvidia-cdi-hook", "create-symlinks",
                        "--link", "libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so",
                    ],
                },
                {
                    "hookName": "createContainer",
                    "path": "/usr/bin/nvidia-cdi-hook",
                    "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", "/usr/lib/x86_64-linux-gnu"],
                    "env": ["NVIDIA_CTK_DEBUG=false"],
                },
            ],
            "additionalGids": [0, 44],
        },
    }  # fmt: skip


def write(folder: Path, name: str, spec: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(spec) if name.endswith("yaml") else json.dumps(spec))
    return path


@pytest.mark.parametrize("name", ["nvidia.yaml", "nvidia.json"])
def test_edits_of_one_gpu(tmp_path: Path, spec: dict[str, Any], library: Path, name: str) -> None:
    write(tmp_path / "cdi", name, spec)
    registry = cdi.load([tmp_path / "none", tmp_path / "cdi"])
    assert registry.problems == () and set(registry.devices) == {"0", "GPU-1", "all"}
    edits = cdi.edits_for(registry, GPUS[:1])
    assert edits.devices == ({"path": "/dev/null", "type": "c", "major": 1, "minor": 3},)
    assert edits.rules == (
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": True, "type": "c", "major": 1, "minor": 7, "access": "rwm"},
    )
    # Another name inside than outside cannot be a device node in a user namespace.
    assert edits.mounts[0]["source"] == "/dev/full" and edits.mounts[0]["destination"] == "/dev/nvidiactl"
    assert edits.mounts[1]["source"] == str(library) and edits.mounts[1]["type"] == "bind"
    assert [hook for hook, _ in edits.hooks] == ["createContainer"] * 2
    assert edits.hooks[1][1]["env"] == ["NVIDIA_CTK_DEBUG=false"]
    assert edits.additional_gids == (44,)
    links = [f"/usr/lib/x86_64-linux-gnu/libcuda.so{version}" for version in ("", ".0", ".1", ".2")]
    assert edits.made == (links[0], "/etc/ld.so.cache", *links[1:])


@pytest.mark.parametrize("folder", ["/lib/x86_64-linux-gnu", "/usr/lib64"])
def test_hooks_of_the_newer_nvidia_ctk(
    tmp_path: Path, spec: dict[str, Any], library: Path, folder: str
) -> None:
    """What 1.18 and newer write; device nodes lie below the driver's root, which need not be the host's."""
    words = {
        "create-symlinks": ["--link", f"libcuda.so.1::{folder}/libcuda.so"],
        "enable-cuda-compat": ["--host-driver-version=580.65.06"],
        "update-ldcache": ["--folder", folder, "--folder", f"{folder}/vdpau"],
        "disable-device-node-modification": [],
        "update-application-profile": [],
    }
    spec["containerEdits"]["hooks"] = [
        {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": ["x", word, *rest]}
        for word, rest in words.items()
    ]
    libraries = ("libcuda.so.580.65.06", "vdpau/libvdpau_nvidia.so.580.65.06")
    spec["containerEdits"]["mounts"] = [
        {"hostPath": str(library), "containerPath": f"{folder}/{name}", "options": ["ro", "rbind"]}
        for name in libraries
    ]
    (tmp_path / "nvidia0").symlink_to("/dev/null")
    spec["devices"][0]["containerEdits"]["deviceNodes"] = [
        {"path": "/dev/nvidia0", "hostPath": str(tmp_path / "nvidia0")}
    ]
    write(tmp_path / "cdi", "nvidia.yaml", spec)
    edits = cdi.edits_for(cdi.load([tmp_path / "cdi"]), GPUS[:1])
    assert {mount["destination"] for mount in edits.mounts} == {
        "/dev/nvidia0",
        "/dev/nvidiactl",
        *(f"{folder}/{name}" for name in libraries),
    }
    # CRIU cannot save the mount that disable-device-node-modification makes.
    ran = [hook["args"][1] for _, hook in edits.hooks]
    assert ran == [word for word in words if word != "disable-device-node-modification"]
    made = {f"{folder}/libcuda.so", f"{folder}/libcuda.so.1", f"{folder}/vdpau/libvdpau_nvidia.so.1"}
    if folder.startswith("/lib/"):  # a link to /usr/lib on most systems
        made |= {f"/usr{path}" for path in made}
    assert made | {"/etc/ld.so.cache"} <= set(edits.made)


def test_two_gpus_share_the_common_edits_once(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path, "nvidia.yaml", spec)
    edits = cdi.edits_for(cdi.load([tmp_path]), GPUS)
    assert [device["path"] for device in edits.devices] == ["/dev/null", "/dev/zero"]
    assert [rule["access"] for rule in edits.rules] == ["rwm", "rw", "rwm"]
    assert len(edits.hooks) == 2 and edits.env == ("NVIDIA_VISIBLE_DEVICES=void",)


def test_apply_adds_behind_what_is_there(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path, "nvidia.yaml", spec)
    edits = cdi.edits_for(cdi.load([tmp_path]), GPUS[:1])
    config: dict[str, Any] = {
        "process": {"env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}},
        "hooks": {"createRuntime": [{"path": "/ours"}], "createContainer": [{"path": "/first"}]},
    }
    before = copy.deepcopy(config)
    result = cdi.apply(config, edits)
    assert config == before
    assert result["process"]["env"] == ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=void"]
    assert result["process"]["user"] == {"uid": 0, "gid": 0, "additionalGids": [44]}
    assert result["mounts"][0]["destination"] == "/proc" and len(result["mounts"]) == 3
    assert result["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}
    assert len(result["linux"]["resources"]["devices"]) == 3
    assert result["hooks"]["createContainer"][0] == {"path": "/first"}
    assert result["hooks"]["createRuntime"] == [{"path": "/ours"}]
    assert cdi.apply(config, cdi.OciEdits())["mounts"] == config["mounts"]


def test_a_copy_on_another_gpu(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path, "nvidia.yaml", spec)
    registry = cdi.load([tmp_path])
    saved = cdi.edits_for(registry, GPUS[:1]).nodes
    edits, new, old = cdi.for_copy(cdi.edits_for(registry, GPUS[1:]), saved)
    assert saved == ("/dev/null",) and new == ("/dev/zero",) and old == saved and edits.devices == ()
    assert edits.mounts[-1]["destination"] == "/dev/null" and edits.mounts[-1]["source"] == "/dev/null"
    assert {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rw"} in edits.rules
    assert not any(rule["minor"] == 3 for rule in edits.rules)


def test_a_copy_on_the_same_gpu_is_as_the_original(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path, "nvidia.yaml", spec)
    edits = cdi.edits_for(cdi.load([tmp_path]), GPUS)
    assert cdi.for_copy(edits, edits.nodes) == (edits, (), ())


def test_the_later_folder_wins(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path / "etc", "nvidia.yaml", spec)
    changed = copy.deepcopy(spec)
    changed["devices"] = [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/random"}]}}]
    write(tmp_path / "run", "nvidia.yaml", changed)
    registry = cdi.load([tmp_path / "etc", tmp_path / "run"])
    assert cdi.edits_for(registry, GPUS[:1]).devices[0]["path"] == "/dev/random"


def test_a_name_given_twice_in_a_folder_is_nobodys(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path, "a.yaml", spec)
    write(tmp_path, "b.json", spec)
    registry = cdi.load([tmp_path])
    assert registry.devices == {} and "a.yaml and in" in registry.problems[0]


@pytest.mark.parametrize("text", ["", "[]", "kind: 3", "{", "kind: nvidia.com/gpu\ndevices: [3]", "\x00"])
def test_a_bad_file_is_a_problem_and_spoils_no_other(tmp_path: Path, spec: dict[str, Any], text: str) -> None:
    write(tmp_path, "good.yaml", spec)
    (tmp_path / "bad.yaml").write_text(text)
    registry = cdi.load([tmp_path])
    assert "0" in registry.devices
    assert len(registry.problems) == (0 if text == "kind: 3" else 1)


def test_other_kinds_are_others(tmp_path: Path, spec: dict[str, Any]) -> None:
    write(tmp_path, "other.json", {**spec, "kind": "vendor.com/net"})
    assert cdi.load([tmp_path]) == cdi.Registry()


def test_a_missing_device_says_how_to_make_the_file(tmp_path: Path) -> None:
    with pytest.raises(GpuUnavailable, match=r"no CDI device nvidia\.com/gpu=0") as caught:
        cdi.edits_for(cdi.load([tmp_path]), GPUS[:1])
    assert "nvidia-ctk cdi generate" in caught.value.hint


def test_a_stale_file_is_named(tmp_path: Path, spec: dict[str, Any], library: Path) -> None:
    write(tmp_path / "cdi", "nvidia.yaml", spec)
    library.unlink()
    with pytest.raises(GpuUnavailable, match=r"libcuda\.so\.580\.65\.06, which is not there"):
        cdi.edits_for(cdi.load([tmp_path / "cdi"]), GPUS[:1])
    spec["containerEdits"]["deviceNodes"] = [{"path": "/dev/nvidia-none"}]
    write(tmp_path / "cdi", "nvidia.yaml", spec)
    with pytest.raises(GpuUnavailable, match="/dev/nvidia-none, which is not there"):
        cdi.edits_for(cdi.load([tmp_path / "cdi"]), GPUS[:1])
