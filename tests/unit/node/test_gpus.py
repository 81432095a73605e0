"""Who has which GPU, over the fake driver of tests/gpu; and that an app without one has nothing to do with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))

from fake_driver import UUIDS, FakeMachine, compile_library

from relume.checkpoint.platform import NO_GPU
from relume.errors import GpuUnavailable
from relume.node.gpus import Gpus

L4 = ["ADA_L4"]
FACTS = ("1 x NVIDIA L4", "driver 580.65.06", "CUDA 13.0")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    made = FakeMachine(tmp_path)
    compile_library(made.library)
    made.describe(gpus=2)
    for name in ("LD_LIBRARY_PATH", "FAKE_CUDA_DIR"):
        monkeypatch.setenv(name, made.env[name])
    (tmp_path / "cdi").mkdir()
    devices = [
        {"name": uuid, "containerEdits": {"deviceNodes": [{"path": path}]}}
        for uuid, path in zip(UUIDS, ("/dev/null", "/dev/zero"), strict=False)
    ]
    link = {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "create-symlinks", "--link", "libcuda.so.1::/usr/lib/libcuda.so"]}  # fmt: skip
    shared = {"hooks": [link]}
    spec = {"kind": "nvidia.com/gpu", "devices": devices, "containerEdits": shared}
    (tmp_path / "cdi/nvidia.json").write_text(json.dumps(spec))
    return made


@pytest.fixture
async def gpus(machine: FakeMachine) -> AsyncIterator[Gpus]:
    made = Gpus([machine.folder / "cdi"])
    yield made
    await made.close()


async def test_each_instance_has_its_own(gpus: Gpus) -> None:
    first, second = await gpus.give("i-1", L4, 1), await gpus.give("i-2", L4, 1)
    assert (first.share.uuids, second.share.uuids) == ((UUIDS[0],), (UUIDS[1],))
    assert first.share.facts == FACTS and first.share.nodes == ("/dev/null",)
    assert first.share.made == ("/usr/lib/libcuda.so",)
    assert await gpus.offers(L4, 1) == ()
    with pytest.raises(GpuUnavailable, match="in use"):
        await gpus.give("i-3", L4, 1)
    gpus.take_back("i-1")
    assert await gpus.offers(L4, 1) == (FACTS,)
    assert (await gpus.give("i-3", L4, 1)).share.uuids == (UUIDS[0],)


async def test_an_adopted_instance_keeps_its_own(gpus: Gpus, machine: FakeMachine) -> None:
    share = (await gpus.give("i-1", L4, 1)).share
    restarted = Gpus([machine.folder / "cdi"])
    restarted.hold("i-1", share)
    try:
        assert (await restarted.give("i-2", L4, 1)).share.uuids == (UUIDS[1],)
    finally:
        await restarted.close()


async def test_a_copy_is_given_the_same_gpu_or_is_mapped_to_another(gpus: Gpus) -> None:
    original = await gpus.give("i-1", L4, 1)
    record = json.loads(json.dumps(original.share.as_dict() | {"processes": []}))
    moved = await gpus.give("i-2", L4, 1, record)
    assert moved.gpu_map == {UUIDS[0]: UUIDS[1]} and moved.new_nodes == ("/dev/zero",)
    assert [mount["destination"] for mount in moved.edits.mounts] == ["/dev/null"]
    gpus.take_back("i-1")
    gpus.take_back("i-2")
    same = await gpus.give("i-3", L4, 1, record)
    assert same.gpu_map == {UUIDS[0]: UUIDS[0]} and same.new_nodes == ()


async def test_how_many_an_instance_can_get(gpus: Gpus, machine: FakeMachine) -> None:
    assert await gpus.most(L4) == 2
    assert await gpus.most(["HOPPER_H100"]) == 0
    assert await gpus.offers(["HOPPER_H100", *L4], 2) == (("2 x NVIDIA L4", *FACTS[1:]),)
    machine.describe(gpus=2, mig=True)
    assert await gpus.most(L4) == 0


async def test_files_of_a_driver_that_was_changed(gpus: Gpus, machine: FakeMachine) -> None:
    (machine.folder / "cdi/nvidia.json").unlink()
    with pytest.raises(GpuUnavailable, match="no CDI device"):
        await gpus.give("i-1", L4, 1)
    assert await gpus.offers(L4, 2) != (), "nothing is held after a failure"


def test_without_a_gpu_nothing_is_imported_or_started(tmp_path: Path) -> None:
    program = """
import asyncio, sys
import relume.node.agent
from relume.node.gpus import Gpus
async def main():
    gpus = Gpus([])
    assert await gpus.offers(("CPU",), 0) == ((),)
    gpus.take_back("i-1")
    await gpus.close()
asyncio.run(main())
assert not [name for name in sys.modules if name.startswith("relume.gpu") or name == "pynvml"]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert NO_GPU == ((),)
