"""Every page of every process of each bench workload, as a copy gets it by the pager, against the image.

The copy is a prepared one: stopped before its first instruction, so that nothing has changed its memory but the pager,
and the kernel in two places.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness import App, Relume, until
from relume.images import read_image, read_pagemap
from relume.linux import cgroup, process

WORKLOADS = sorted(
    path.name for path in (Path(__file__).parents[3] / "bench/workloads").iterdir() if path.is_dir()
)
_BLOCK = 1 << 20
_RSEQ_BYTES = 32
_RED_ZONE_BYTES = 128
_SIGNAL_FRAME_BYTES = 16 << 10
_QUICK = "tiny"


@pytest.mark.parametrize(
    "workload",
    [
        pytest.param(name, marks=[] if name == _QUICK else [pytest.mark.slow, pytest.mark.timeout(1800)])
        for name in WORKLOADS
    ],
)
def test_every_page_of_every_process(relume: Relume, app: App, workload: str) -> None:
    shutil.copytree(
        Path(__file__).parents[3] / "bench/workloads" / workload, app.directory, dirs_exist_ok=True
    )
    config = app.directory / "cerebrium.toml"
    text = config.read_text()
    name = next(line for line in text.splitlines() if line.startswith("name"))
    config.write_text(text.replace(name, f'name = "{app.name}"') + "\n[relume.checkpoint]\nprepared = 1\n")
    relume.run("deploy", str(app.directory), "-y", timeout=1200)
    relume.json("start", app.name, timeout=600)

    def prepared() -> list[dict[str, Any]]:
        return [row for row in relume.ps(app.name) if row["state"] == "prepared"]

    (waiting,) = until(prepared, 120, "nothing was prepared")
    (checkpoint,) = relume.checkpoints(app.name)
    images = relume.state / "checkpoints" / checkpoint["checkpoint_id"] / "images"
    group = f"/relume/{relume.json('node', 'status')['node_id']}/{waiting['instance_id']}"
    by_pid = {process.inner_pid(pid): pid for pid in cgroup.processes(group)}
    compared = 0
    for task in read_image(images / "pstree.img"):
        if (images / f"pagemap-{task.pid}.img").exists():
            compared += _compare(images, task.pid, by_pid[task.pid])
    assert compared > 0


def _compare(images: Path, pid: int, host_pid: int) -> int:
    """Bytes of lazy memory that are the image's; reading them is a fault for each page that is not there yet."""
    pagemap = read_pagemap(images, pid)
    cores = [read_image(path)[0] for path in images.glob("core-*.img")]
    stacks = {core.thread_info.gpregs.sp for core in cores}
    # What the kernel writes by itself: the number of the processor that a thread runs on (struct rseq); below its
    # stack, the frame of a signal that comes before the SIGSTOP, as SIGCHLD does, children being stopped already.
    changed = [
        *((core.thread_core.rseq_entry.rseq_abi_pointer, _RSEQ_BYTES) for core in cores),
        *((sp - _RED_ZONE_BYTES - _SIGNAL_FRAME_BYTES, _SIGNAL_FRAME_BYTES) for sp in stacks),
    ]
    compared = 0
    with pagemap.pages.open("rb") as pages:
        for extent in pagemap.lazy:
            for at in range(0, extent.length, _BLOCK):
                length = min(_BLOCK, extent.length - at)
                address = extent.address + at
                expected = bytearray(os.pread(pages.fileno(), length, extent.offset + at))
                found = _read(host_pid, address, length)
                for place, size in changed:
                    low, high = max(address, place), min(address + length, place + size)
                    if low < high:
                        for content in (expected, found):
                            content[low - address : high - address] = bytes(high - low)
                assert found == expected, f"process {pid}: {address:#x}"
                compared += length
    return compared


def _read(pid: int, address: int, length: int) -> bytearray:
    """By process_vm_readv(2): through /proc/PID/mem the kernel does not wait for a pager, it answers EIO."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.process_vm_readv.restype = ctypes.c_ssize_t
    content = bytearray(length)
    ours = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(content)), length)
    theirs = (ctypes.c_size_t * 2)(address, length)
    got = libc.process_vm_readv(pid, ours, ctypes.c_ulong(1), theirs, ctypes.c_ulong(1), ctypes.c_ulong(0))
    if got != length:  # memory that its owner may not read either: it has come in, or this fails
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            return bytearray(os.pread(memory.fileno(), length, address))
    return content
