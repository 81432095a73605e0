"""Processes that share memory by fork: what a copy holds, paged in and eagerly, and which of the two it is."""

from __future__ import annotations

import contextlib

import pytest

from harness import SNIPPET, App, Relume, get, until
from relume.linux import cgroup

MIB = 1 << 20
SHARED = 128 * MIB
WORKERS = 3

# Every worker has all of it by fork, and says on request whether each page is as it must be.
PREFORKED = f"""
import multiprocessing
blob = bytearray({SHARED})
for at in range(0, {SHARED}, 4096):
    blob[at : at + 8] = (at + 1).to_bytes(8, "little")
def work(asked, answers):
    while asked.get():
        answers.put(sum(int.from_bytes(blob[at : at + 8], "little") != at + 1 for at in range(0, {SHARED}, 4096)))
fork = multiprocessing.get_context("fork")
pairs = [(fork.SimpleQueue(), fork.SimpleQueue()) for _ in range({WORKERS})]
for pair in pairs:
    fork.Process(target=work, args=pair, daemon=True).start()
def look(_):
    wrong = []
    for asked, answers in pairs:
        asked.put(True)
        wrong.append(answers.get())
    return wrong
ACTIONS["look"] = look
{SNIPPET}
serve()
"""


def charged(relume: Relume, instance: str) -> int:
    """Bytes that its cgroup holds without page cache."""
    group = f"/relume/{relume.json('node', 'status')['node_id']}/{instance}"
    for directory in cgroup.directories(group):
        with contextlib.suppress(FileNotFoundError):
            for line in (directory / "memory.stat").read_text().splitlines():
                if line.startswith(("anon ", "total_rss ")):
                    return int(line.split()[1])
    raise AssertionError(f"{group} does not count its memory")


@pytest.mark.parametrize("gib", [0.5, 1.0], ids=["does-not-fit", "fits"])
def test_memory_after_the_restore(relume: Relume, app: App, gib: float) -> None:
    app.write(PREFORKED)
    config = app.directory / "cerebrium.toml"
    config.write_text(config.read_text() + f"[cerebrium.hardware]\nmemory = {gib}\n")
    relume.deploy(app.directory)
    first = relume.start(app.name)
    original = charged(relume, first["instance_id"])
    assert original < 2 * SHARED, "shared by fork"
    relume.run("stop", first["instance_id"])
    (checkpoint,) = relume.checkpoints(app.name)
    copy = relume.start(app.name)
    inspected = relume.json("checkpoints", "inspect", checkpoint["checkpoint_id"])
    assert inspected["memory"] == copy["memory"]
    if gib == 0.5:
        # Four processes of 128 MiB and more, 15 % to spare: more than 512 MiB.
        assert copy["memory"].startswith("eager: paged in, its processes need ")
        assert charged(relume, copy["instance_id"]) < 1.2 * original, "shared again"
    else:
        assert copy["memory"] == "paged"
    assert get(copy, "/look") == [0] * WORKERS
    if gib == 1.0:
        all_private = (WORKERS + 1) * SHARED
        until(lambda: charged(relume, copy["instance_id"]) >= all_private, 60, "the fill does not end")
        assert charged(relume, copy["instance_id"]) < 1.25 * all_private
    assert get(copy, "/look") == [0] * WORKERS
