"""Keepers come from a process that has everything imported, and don't depend on it. Real processes, no container."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relume.engine.jobs import Container
from relume.keeper.client import Keeper
from relume.keeper.zygote import Zygote, serve
from relume.linux import process


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    made = Zygote()
    yield made
    await made.close()


def container(place: Path, name: str) -> Container:
    runtime = place / name
    runtime.mkdir()
    return Container(
        name, str(runtime), "/bin/false", str(place / "runc"), "/bin/false", f"/none/{name}", outgoing=False
    )


async def told(box: Container) -> tuple[Keeper, dict[str, object]]:
    keeper = Keeper(box, lambda event: None)
    return keeper, await keeper.connect()


def names_of_children(pid: int) -> list[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [Path(f"/proc/{child}/comm").read_text().strip() for child in children]


async def end(pid: int, keeper: Keeper) -> None:
    """A keeper without a container goes when its node does; here it has 10 s for that, and we don't wait for it."""
    await keeper.close()
    process.send(pid, signal.SIGKILL)
    await process.ended(pid)


async def test_a_keeper_answers_and_has_a_pager_and_a_name(zygote: Zygote, tmp_path: Path) -> None:
    box = container(tmp_path, "i-one")
    pid = await zygote.spawn(box)
    keeper, facts = await told(box)
    assert facts["instance_id"] == "i-one"
    assert os.getsid(pid) == pid
    assert Path(f"/proc/{pid}/cmdline").read_text().startswith(f"relume.keeper {box.runtime}\0")
    assert Path(f"/proc/{pid}/comm").read_text().strip() == "relume-keeper"
    while names_of_children(pid) != ["relume-holder"]:  # noqa: ASYNC110  (nothing tells when it has made the pager)
        await asyncio.sleep(0.01)
    assert "PATH" in Path(f"/proc/{pid}/environ").read_text(), "its title must not overwrite its environment"
    await end(pid, keeper)


async def test_keepers_outlive_it_and_another_is_started(zygote: Zygote, tmp_path: Path) -> None:
    first = container(tmp_path, "i-first")
    pid = await zygote.spawn(first)
    keeper, _ = await told(first)
    assert zygote._process is not None
    zygote._process.kill()
    await zygote._process.wait()
    assert (await keeper.ask("hello"))["instance_id"] == "i-first"
    second = container(tmp_path, "i-second")
    other = await zygote.spawn(second)
    keeper2, facts = await told(second)
    assert facts["instance_id"] == "i-second"
    await end(pid, keeper)
    await end(other, keeper2)


async def test_many_at_once(zygote: Zygote, tmp_path: Path) -> None:
    boxes = [container(tmp_path, f"i-{number}") for number in range(8)]
    pids = await asyncio.gather(*(zygote.spawn(box) for box in boxes))
    assert len(set(pids)) == 8
    for pid, box in zip(pids, boxes, strict=True):
        keeper, facts = await told(box)
        assert facts["instance_id"] == box.instance_id
        await end(pid, keeper)


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_node_killed_while_it_asks_is_no_fault(asked: int) -> None:
    """The kernel resets the connection where an answer was unread: neither that nor a closed one is an error."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            ours.close()
            serve(theirs, lambda container: os._exit(0))
            os._exit(0)
        os._exit(1)
    theirs.close()
    request = json.dumps(
        dataclasses.asdict(Container("i-x", "/none", "", "", "", "", outgoing=False))
    ).encode()
    for _ in range(asked):
        ours.send(request)
    for _ in range(asked):
        select.select([ours], [], [], 10)  # answered, and not read
    ours.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def test_it_ends_with_the_node(tmp_path: Path) -> None:
    zygote = Zygote()
    box = container(tmp_path, "i-last")
    pid = await zygote.spawn(box)
    keeper, _ = await told(box)
    assert zygote._process is not None and zygote._control is not None
    zygote._control.close()  # as the kernel does for a node that is killed
    async with asyncio.timeout(20):
        await zygote._process.wait()
    assert process.start_time(pid) is not None
    await end(pid, keeper)
    with contextlib.suppress(OSError):
        await zygote.close()
