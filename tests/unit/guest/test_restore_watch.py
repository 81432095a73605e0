"""How the runner notices that it woke up elsewhere."""

from __future__ import annotations

import random
import time

import pytest

from relume.guest.runner.relume_runner import _restore
from relume.guest.sdk import relume as sdk

from .conftest import Sidecar


@pytest.fixture
def watch(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> _restore.RestoreWatch:
    # In a container `import relume` is the SDK.
    monkeypatch.setattr(_restore, "_sdk", sdk)
    return _restore.RestoreWatch()


def _wall_clock_jumps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + seconds)


def test_no_restore(watch: _restore.RestoreWatch) -> None:
    assert not watch.confirm()
    assert not watch.check()


def test_a_restore_is_noticed_once_and_reseeds(watch: _restore.RestoreWatch, sidecar: Sidecar) -> None:
    state = random.getstate()
    sidecar.restore()
    assert watch.confirm()
    assert random.getstate() != state
    assert not watch.confirm()


def test_without_a_jump_of_the_clocks_nobody_is_asked(watch: _restore.RestoreWatch, sidecar: Sidecar) -> None:
    sidecar.restore()
    assert not watch.check()


def test_a_jump_of_the_clocks_leads_to_the_question(
    watch: _restore.RestoreWatch, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar.restore()
    _wall_clock_jumps(monkeypatch, 3600)
    assert watch.check()
    assert not watch.check()


def test_a_clock_that_was_set_is_no_restore(
    watch: _restore.RestoreWatch, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    _wall_clock_jumps(monkeypatch, -60)
    assert not watch.check()


def test_reseeding_can_be_switched_off(
    watch: _restore.RestoreWatch, sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELUME_RESEED", "0")
    state = random.getstate()
    sidecar.restore()
    assert watch.confirm()
    assert random.getstate() == state


@pytest.mark.parametrize("reseed", [True, False])
def test_what_the_sdk_has_handled_is_noticed_and_left_alone(
    watch: _restore.RestoreWatch, sidecar: Sidecar, reseed: bool
) -> None:
    """``checkpoint(reseed=False)``, or a seed that the app sets after the checkpoint, must last."""
    sidecar.on_post = lambda: sidecar.restore("r-1")
    assert sdk.checkpoint(reseed=reseed).restored
    random.seed(7)
    state = random.getstate()
    assert watch.confirm()
    assert random.getstate() == state


def test_a_later_restore_is_not_the_one_that_the_sdk_has_handled(
    watch: _restore.RestoreWatch, sidecar: Sidecar
) -> None:
    sidecar.on_post = lambda: sidecar.restore("r-1")
    assert sdk.checkpoint().restored
    assert watch.confirm()
    state = random.getstate()
    sidecar.restore("r-2")
    assert watch.confirm()
    assert random.getstate() != state
