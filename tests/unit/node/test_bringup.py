"""Which of several accounts of a failed restore counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.errors import EngineError, HostError
from relume.keeper.client import KeeperLost
from relume.node import bringup as module
from relume.node.bringup import BringUp
from relume.node.instance import Instance
from relume.node.places import Places

FULL = "(00.1) Error (criu/util.c:1): Can't write /x: No space left on device\n"
OTHER = "(00.1) Error (criu/files-reg.c:2174): File tmp/a has bad size 4 (expect 3)\n"


@pytest.fixture
def reason(
    places: Places, instance: Callable[..., Instance], tmp_path: Path
) -> Callable[[Exception, str], Exception]:
    """What is said of an error, with that log of CRIU's."""
    nobody = cast("Any", None)
    bringup = BringUp(places, nobody, nobody, nobody, None, log_limit=1, pages_lazily=True)
    failed = instance(memory="eager: asked for", places=SimpleNamespace(criu_work=tmp_path))

    def ask(error: Exception, log: str) -> Exception:
        (tmp_path / "restore.log").write_text(log)
        restoration = cast("Any", SimpleNamespace(fetched=None))
        return asyncio.run(bringup._reason(failed, restoration, error))

    return ask


def test_a_full_disk_is_the_machines(reason: Callable[[Exception, str], Exception]) -> None:
    told = reason(EngineError("runc restore ended with status 1"), FULL)
    assert isinstance(told, HostError), "not to be counted against the checkpoint"
    assert "full" in told.message


def test_criu_knows_better_than_runc(reason: Callable[[Exception, str], Exception]) -> None:
    told = reason(EngineError("runc restore ended with status 1"), OTHER)
    assert type(told) is EngineError
    assert "runc" not in told.message


@pytest.mark.parametrize("log", [FULL, OTHER])
def test_a_lost_keeper_stays_that(reason: Callable[[Exception, str], Exception], log: str) -> None:
    lost = KeeperLost("the keeper of i-1 is gone")
    assert reason(lost, log) is lost


async def test_a_restore_that_hangs_is_given_up() -> None:
    with pytest.raises(EngineError, match="CRIU was not done"):
        await module._within(0.01, asyncio.sleep(60), "CRIU")
    assert await module._within(5, asyncio.sleep(0, 7), "CRIU") == 7
