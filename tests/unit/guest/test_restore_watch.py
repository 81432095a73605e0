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
