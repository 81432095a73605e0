"""What the doctor says on machines with and without a usable GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_driver import UUIDS, FakeMachine

from relume.gpu.client import DriverHelper
from relume.gpu.doctor import examine


def cdi_file(folder: Path) -> None:
    devices = [{"name": uuid, "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}} for uuid in UUIDS]
    (folder / "nvidia.json").write_text(json.dumps({"kind": "nvidia.com/gpu", "devices": devices}))


async def test_no_gpu_is_one_finding_and_nothing_wrong(no_gpu: dict[str, str]) -> None:
    async with DriverHelper(env=no_gpu) as helper:
        (finding,) = await examine(helper)
    assert finding.level == "absent" and "no NVIDIA GPU" in finding.message


async def test_a_machine_that_can_all(helper: DriverHelper, fake: FakeMachine, tmp_path: Path) -> None:
    cdi_file(tmp_path)
    findings = await examine(helper, [tmp_path])
    assert {finding.name: finding.level for finding in findings if finding.name != "gpu arch"} == {
        "gpu": "ok",
        "gpu driver": "ok",
        "gpu libcuda": "ok",
        "gpu cdi": "ok",
    }


async def test_everything_wrong_is_named_with_a_remedy(fake: FakeMachine, tmp_path: Path) -> None:
    fake.describe(version="565.57.01", cuda=12070, gpus=2, mig=True)
    fake.fault("init", 100)
    (tmp_path / "bad.yaml").write_text("{")
    async with DriverHelper(env=fake.env) as helper:
        findings = await examine(helper, [tmp_path])
    wrong = {(finding.name, finding.level) for finding in findings if finding.level != "ok"}
    assert wrong >= {
        ("gpu driver", "problem"),
        ("gpu libcuda", "problem"),
        ("gpu mig", "warning"),
        ("gpu cdi", "problem"),
        ("gpu cdi", "warning"),
    }
    assert all(finding.hint for finding in findings if finding.level != "ok" and finding.name != "gpu arch")


async def test_a_driver_that_cannot_move_a_checkpoint(fake: FakeMachine, tmp_path: Path) -> None:
    fake.describe(version="570.86.10", cuda=12080, gpus=2)
    cdi_file(tmp_path)
    async with DriverHelper(env=fake.env) as helper:
        findings = await examine(helper, [tmp_path])
    (warning,) = [
        finding for finding in findings if finding.level == "warning" and finding.name != "gpu arch"
    ]
    assert warning.hint.startswith("driver 580")


async def test_a_hook_that_is_not_installed_is_named(helper: DriverHelper, tmp_path: Path) -> None:
    cdi_file(tmp_path)
    path = tmp_path / "nvidia.json"
    spec = json.loads(path.read_text())
    spec["containerEdits"] = {"hooks": [{"hookName": "createContainer", "path": "/none/nvidia-cdi-hook"}]}
    path.write_text(json.dumps(spec))
    (finding,) = [each for each in await examine(helper, [tmp_path]) if each.name == "gpu cdi"]
    assert finding.level == "problem" and "/none/nvidia-cdi-hook" in finding.message


async def test_the_helper_sees_all_gpus(fake: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    async with DriverHelper(env=fake.env) as helper:
        await helper.hello()
        environment = Path(f"/proc/{helper.pid}/environ").read_bytes()
    assert b"FAKE_CUDA_DIR=" in environment and b"CUDA_VISIBLE_DEVICES" not in environment
