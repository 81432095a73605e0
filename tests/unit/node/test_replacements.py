"""Who takes the place of an instance that its memory or its GPU failed, and who does not."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.checkpoint.shelf import Health
from relume.errors import (
    BuildError,
    EngineError,
    GpuLost,
    GpuUnavailable,
    HostError,
    ImageError,
    PagerError,
    StartFailed,
    Untrusted,
)
from relume.keeper.client import KeeperLost
from relume.node.background import Background
from relume.node.failures import Failures
from relume.node.instance import Instance
from relume.node.requests import Requests
from relume.node.start import Start, Starts

MakeInstance = Callable[..., Instance]


class Node:
    """A node whose starts only say what they were asked for."""

    def __init__(self, make: MakeInstance) -> None:
        self._make = make
        self.starts = Starts()
        self.background = Background()
        self.asked: list[tuple[dict[str, str], bool]] = []
        """Environment, and whether a restore was wanted."""
        self.counted: list[tuple[str, bool]] = []
        """Reason, and whether it counts as damage."""
        self.looking = asyncio.Event()
        """Opens the look at an image whose pager failed."""
        self.looking.set()
        self.discarding = asyncio.Event()
        self.discarding.set()
        shelf = SimpleNamespace(
            load=lambda name: SimpleNamespace(checkpoint_id=name), restore_failed=self._count
        )
        self.failures = Failures(
            cast("Any", shelf),
            cast("Any", None),
            cast("Any", None),
            cast("Any", SimpleNamespace(why_paging_failed=self._why)),
            cast("Any", None),
            self.background,
            None,
            self.starts,
            start=cast("Any", self._start),
            boot=self._boot,
        )
        ending = SimpleNamespace(discard=self._discard)
        self.requests = Requests(
            cast("Any", None), cast("Any", ending), self.background, self.starts, boot=self._boot
        )

    def _count(self, checkpoint_id: str, reason: str, *, damaged: bool) -> Health:
        self.counted.append((reason, damaged))
        return Health(1, False, reason)

    async def _why(self, instance: Instance, checkpoint: Any) -> Exception:
        await self.looking.wait()
        return PagerError("killed")

    async def _start(self, start: Start, *, restore_wanted: bool) -> Any:
        start.proceed()
        self.asked.append((dict(start.environment), restore_wanted))
        return SimpleNamespace(instance=self._make(f"i-{len(self.asked) + 1}"))

    async def _boot(self, start: Start, *, deferred: bool = False, maker: bool = False) -> Instance:
        start.proceed()
        self.asked.append((dict(start.environment), False))
        return self._make("i-booted")

    async def _discard(self, instance: Instance, state: str) -> None:
        await self.discarding.wait()


@pytest.fixture
async def node(instance: MakeInstance) -> Node:
    return Node(instance)


async def test_another_takes_its_place(node: Node, instance: MakeInstance) -> None:
    failed = instance(environment={"TOKEN": "t"})
    replacing = asyncio.create_task(node.failures.replace(failed))
    await asyncio.sleep(0.01)
    assert node.asked == [], "it has not ended yet"
    failed.ended.set()
    await replacing
    assert node.asked == [({"TOKEN": "t"}, True)]
    assert node.counted == [("killed", False)]


async def test_a_stop_while_the_image_is_looked_at(node: Node, instance: MakeInstance) -> None:
    node.looking.clear()
    failed = instance()
    failed.ended.set()
    replacing = asyncio.create_task(node.failures.replace(failed))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await node.starts.call_off("a")
    with pytest.raises(StartFailed, match="was stopped"):
        await replacing
    assert node.asked == []
    node.looking.set()
    await asyncio.sleep(0.01)
    assert node.counted == [("killed", False)], "and that it failed is not forgotten"


async def test_one_that_is_being_stopped_has_no_successor(node: Node, instance: MakeInstance) -> None:
    failed = instance(state="stopping")
    replacing = asyncio.create_task(node.failures.replace(failed))
    failed.ended.set()
    await replacing
    assert node.asked == []


async def test_nothing_restores_for_ever(
    node: Node, instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Instance] = []
    monkeypatch.setattr(node, "_make", lambda name: made.append(instance(name)) or made[-1])
    failed = instance()
    for _ in range(2):
        failed.ended.set()
        await node.failures.replace(failed)
        failed = made[-1]
    assert [restore for _, restore in node.asked] == [True, False]


@pytest.mark.parametrize("stopped", ["before", "meanwhile", "never"])
async def test_a_lost_gpu(node: Node, instance: MakeInstance, stopped: str) -> None:
    lost = instance(state="stopping" if stopped == "before" else "ready")
    node.discarding.clear()
    replacing = asyncio.create_task(node.requests.lost(lost, GpuLost("gone")))
    await asyncio.sleep(0.01)
    calling_off = asyncio.create_task(node.starts.call_off("a")) if stopped == "meanwhile" else None
    await asyncio.sleep(0.01)
    node.discarding.set()
    if calling_off is not None:
        with pytest.raises(StartFailed):
            await replacing
        await calling_off
    else:
        await replacing
    assert len(node.asked) == (1 if stopped == "never" else 0)


SHORTAGES = (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)


@pytest.mark.parametrize(
    "error",
    [
        HostError("no keeper can be started"),
        KeeperLost("the keeper does not answer"),
        BuildError("a layer is gone"),
        GpuUnavailable("taken"),
        *(OSError(number, "short") for number in SHORTAGES),
    ],
)
async def test_what_the_machine_lacks_is_not_counted(node: Node, error: Exception) -> None:
    checkpoint: Any = SimpleNamespace(checkpoint_id="cp-1", left_behind={})
    said = await node.failures.restore_failed(checkpoint, cast("Any", None), error, None)
    assert said.startswith("restore failed: ")
    assert node.counted == []


@pytest.mark.parametrize(
    ("error", "damaged"),
    [
        (EngineError("CRIU: no"), False),
        (PagerError("killed"), False),
        (StartFailed("not ready"), False),
        (FileNotFoundError(errno.ENOENT, "a held file"), False),
        (OSError(errno.EIO, "a disk that does not read"), False),
        (ValueError("nonsense"), False),
        (Untrusted("another hash"), True),
        (ImageError("short"), True),
    ],
)
async def test_what_the_checkpoint_may_be_at_fault_for_is(
    node: Node, error: Exception, damaged: bool
) -> None:
    checkpoint: Any = SimpleNamespace(checkpoint_id="cp-1", left_behind={})
    await node.failures.restore_failed(checkpoint, cast("Any", None), error, None)
    assert [bad for _, bad in node.counted] == [damaged]


async def test_a_copy_of_the_region_is_let_go_uncounted(node: Node) -> None:
    ended: list[str] = []
    copies = SimpleNamespace(
        finish=lambda copy: ended.append("finished"), failed=lambda copy, error: ended.append("failed")
    )
    node.failures._region = cast("Any", SimpleNamespace(copies=copies))
    checkpoint: Any = SimpleNamespace(checkpoint_id="cp-1", left_behind={})
    for error in (HostError("no keeper"), EngineError("CRIU: no")):
        await node.failures.restore_failed(checkpoint, cast("Any", None), error, cast("Any", object()))
    assert ended == ["finished", "failed"]
