"""An app with a GPU through the command line: our driver in the GPU's place (tests/gpu), all else real."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import SNIPPET, App, Failed, Relume, get, share_builds, until

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))

from fake_driver import UUIDS, FakeMachine, compile_library

SIZE = 8 << 20
NODES = [f"relume-test-gpu-{os.getpid()}-{index}" for index in range(2)]
"""Of this run alone: another one on the same machine has its own."""
HARDWARE = '[cerebrium.hardware]\ncompute = "ADA_L4"\nmemory = {memory}\ngpu_count = {count}\n'

# Content that is on the device and nowhere else: the app keeps its hash only.
DEVICE = f"""
import ctypes, hashlib
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    assert code == 0, (name, code)
context, address, size = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_size_t({SIZE})
call("cuInit", 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
call("cuCtxSetCurrent", context)
call("cuMemAlloc_v2", ctypes.byref(address), size)
content = os.urandom(size.value)
call("cuMemcpyHtoD_v2", address, content, size)
SAVED = hashlib.sha256(content).hexdigest()
del content
def read(_):
    buffer = ctypes.create_string_buffer(size.value)
    call("cuMemcpyDtoH_v2", buffer, address, size)
    return {{"same": hashlib.sha256(buffer).hexdigest() == SAVED, "hash": SAVED}}
ACTIONS["device"] = read
ACTIONS["nodes"] = lambda _: [name for name in os.listdir("/dev") if "relume" in name]
ACTIONS["ask"] = lambda _: json.loads(urllib.request.urlopen(
    urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST"), timeout=60).read())
"""


@pytest.fixture
def machine() -> Iterator[FakeMachine]:
    """Two L4, whose device nodes swallow what is written to them. It lies where an instance's root can come, as
    libraries do: CRIU opens what is mounted from outside as that user."""
    made = FakeMachine(Path(f"/var/tmp/relume-test-gpu-{time.monotonic_ns()}"))
    made.folder.mkdir(mode=0o755)
    compile_library(made.library)
    made.describe(gpus=2)
    made.state.chmod(0o777)
    cdi = made.describe_cdi() / "nvidia.json"
    spec = json.loads(cdi.read_text())
    nodes = [Path(f"/dev/{name}") for name in NODES]
    for node, device in zip(nodes, spec["devices"], strict=False):
        node.unlink(missing_ok=True)
        os.mknod(node, 0o20666, os.makedev(1, 3))
        device["containerEdits"]["deviceNodes"] = [{"path": str(node)}]
    cdi.write_text(json.dumps(spec))
    yield made
    for node in nodes:
        node.unlink()
    shutil.rmtree(made.folder)


@pytest.fixture
def node(workplace: Path, relume: Relume, machine: FakeMachine) -> Iterator[Relume]:
    """A node on that machine; it shares the session's made bases."""
    state = workplace / f"state-{time.monotonic_ns()}"
    state.mkdir(mode=0o700)
    share_builds(relume, state)
    config = machine.folder / "node.toml"
    config.write_text(f'[node]\ncdi_spec_dirs = ["{machine.folder / "cdi"}"]\n')
    made = Relume(state, config=config, env=machine.env)
    made.start_node()
    yield made
    with contextlib.suppress(Failed):
        made.close()
    shutil.rmtree(state, ignore_errors=True)


def with_gpu(app: App, *, asks: bool, memory: float = 1, count: int = 1) -> Path:
    trigger = SNIPPET if asks else "import urllib.request"
    app.write(DEVICE + trigger + "\nserve()\n", extra=HARDWARE.format(memory=memory, count=count))
    return app.directory


def test_a_copy_has_the_device_memory_on_a_gpu_of_its_own(
    node: Relume, machine: FakeMachine, app: App
) -> None:
    directory = with_gpu(app, asks=True)
    node.deploy(directory)
    original = node.start(app.name)
    answer = node.answer_of_post(original["instance_id"])
    assert answer["status"] == "created", answer
    assert get(original, "/device")["same"]
    assert get(original, "/facts")["env"]["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    inspected = node.json("checkpoints", "inspect", answer["checkpoint_id"])
    assert inspected["platform"]["gpu"] == ["1 x NVIDIA L4", "driver 580.65.06", "CUDA 13.0"]
    assert inspected["gpu"]["uuids"] == [UUIDS[0]] and inspected["gpu"]["host_bytes"] >= SIZE
    assert inspected["gpu"]["processes"][0]["device_bytes"] == SIZE
    assert inspected["would_be_used"], inspected["why_not"]

    copy = node.start(app.name)
    assert copy["restored"], copy["reason"]
    assert get(copy, "/device") == get(original, "/device")
    assert get(original, "/nodes") == [NODES[0]]
    assert get(copy, "/nodes") == [NODES[1]]
    assert machine.device_bytes() == 2 * SIZE

    with pytest.raises(Failed, match=r"no 1 free GPU for compute = ADA_L4.*in use"):
        node.start(app.name)
    node.stop(original["instance_id"])
    again = node.start(app.name)
    assert again["restored"] and get(again, "/device")["same"]


def test_what_goes_wrong_at_a_checkpoint_costs_the_checkpoint(
    node: Relume, machine: FakeMachine, app: App
) -> None:
    node.deploy(with_gpu(app, asks=False))
    started = node.start(app.name)
    machine.fault("lock", 600)
    answer = get(started, "/ask")
    assert (answer["status"], answer["reason"], answer["code"]) == ("failed", "gpu", "gpu/timeout"), answer
    machine.fault("checkpoint", 801)
    answer = get(started, "/ask")
    assert (answer["status"], answer["reason"]) == ("failed", "unsupported"), answer
    assert get(started, "/device")["same"]
    assert not node.checkpoints(app.name)
    # A restart of the node in the middle of all that: the GPU is still this instance's.
    node.kill_node()
    node.start_node()
    assert get(started, "/device")["same"]
    assert get(started, "/ask")["status"] == "created"
    assert get(started, "/device")["same"]


def test_memory_that_would_not_fit_is_refused_with_the_numbers(node: Relume, app: App) -> None:
    node.deploy(with_gpu(app, asks=False, memory=0.02))
    started = node.start(app.name)
    answer = get(started, "/ask")
    assert (answer["status"], answer["reason"]) == ("failed", "insufficient_memory"), answer
    assert answer["device_bytes"] == SIZE and answer["needed_bytes"] > answer["free_bytes"]
    assert get(started, "/nodes") == [NODES[0]]  # it goes on; there is no room to read device memory back


def test_an_original_that_is_lost_is_replaced(node: Relume, machine: FakeMachine, app: App) -> None:
    node.deploy(with_gpu(app, asks=False))
    started = node.start(app.name)
    before = get(started, "/device")["hash"]
    machine.fault("restore", 999, times=100)
    with contextlib.suppress(OSError):
        get(started, "/ask")
    (other,) = until(
        lambda: [
            r
            for r in node.ps(app.name)
            if r["state"] == "ready" and r["instance_id"] != started["instance_id"]
        ]
    )
    assert get(other, "/device")["same"] and get(other, "/device")["hash"] != before
    assert get(other, "/ask")["reason"] == "deferred"


def test_a_copy_that_gets_no_gpu_is_booted(node: Relume, machine: FakeMachine, app: App) -> None:
    node.deploy(with_gpu(app, asks=True))
    original = node.start(app.name)
    assert node.answer_of_post(original["instance_id"])["status"] == "created"
    machine.fault("restore", 999, times=3)
    booted = node.start(app.name)
    assert not booted["restored"] and "CUDA driver cannot bring back" in booted["reason"]
    assert (
        get(booted, "/device")["same"] and get(booted, "/device")["hash"] != get(original, "/device")["hash"]
    )


def test_the_node_killed_with_the_memory_put_away(node: Relume, machine: FakeMachine, app: App) -> None:
    node.deploy(with_gpu(app, asks=False))
    started = node.start(app.name)
    machine.fault("restore", 0, delay_ms=1500, also="after")
    with contextlib.suppress(OSError):
        get(started, "/ask", timeout=0.2)
    until(lambda: machine.device_bytes() == 0)
    node.kill_node()
    assert machine.device_bytes() == 0
    node.start_node()
    until(lambda: node.checkpoints(app.name) and get(started, "/device")["same"])


def test_more_gpus_than_there_are(node: Relume, app: App) -> None:
    with pytest.raises(Failed, match="can get 2"):
        node.deploy(with_gpu(app, asks=False, count=3))
