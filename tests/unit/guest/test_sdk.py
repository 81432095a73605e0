"""The SDK against an endpoint that answers, cuts, hangs, or has become another container's."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from typing import Any

import pytest

from relume.guest.sdk import relume as sdk
from relume.guest.sdk.relume import _sidecar

from .conftest import Sidecar


def test_created(sidecar: Sidecar) -> None:
    result = sdk.checkpoint()
    assert (result.status, result.restored, result.checkpoint_id) == ("created", False, "c-1")
    assert result.environment == {"GREETING": "hello"}
    assert result.answer["status"] == "created"


def test_skipped_keeps_the_reason(sidecar: Sidecar) -> None:
    sidecar.on_post = lambda: {"status": "skipped", "reason": "exists", "checkpoint_id": "c-0"}
    result = sdk.checkpoint()
    assert (result.status, result.reason, result.restored) == ("skipped", "exists", False)


def test_a_copy_knows_it_by_the_restore_id(sidecar: Sidecar) -> None:
    def restored_elsewhere() -> None:
        sidecar.restore("r-7", GREETING="ciao")

    sidecar.on_post = restored_elsewhere
    result = sdk.checkpoint()
    assert (result.status, result.restored, result.restore_id) == ("restored", True, "r-7")
    assert result.environment["GREETING"] == "ciao"
    assert sdk.restore_id() == "r-7"


def test_a_cut_connection_alone_is_no_restore(sidecar: Sidecar) -> None:
    sidecar.on_post = lambda: None
    result = sdk.checkpoint()
    assert (result.status, result.restored, result.reason) == ("failed", False, "no_answer")
    assert "RemoteDisconnected" in result.message


def test_an_answer_does_not_hide_a_restore(sidecar: Sidecar) -> None:
    """Restored between the first question and the request, by somebody else's checkpoint: the request is
    skipped, and this process is a copy all the same."""

    def restored() -> dict[str, Any]:
        sidecar.restore()
        return {"status": "skipped", "reason": "restored"}

    sidecar.on_post = restored
    assert sdk.checkpoint().restored


def test_a_second_request_in_a_copy_is_not_a_restore(sidecar: Sidecar) -> None:
    sidecar.restore()
    sidecar.on_post = lambda: {"status": "skipped", "reason": "restored"}
    result = sdk.checkpoint()
    assert (result.status, result.restored, result.restore_id) == ("skipped", False, "r-1")


def test_time_out(sidecar: Sidecar) -> None:
    held = threading.Event()

    def hang() -> None:
        held.wait(5)

    sidecar.on_post = hang
    result = sdk.checkpoint(timeout=0.1)
    held.set()
    assert (result.status, result.reason) == ("failed", "timeout")


def test_a_sidecar_that_is_gone_is_reported_and_not_raised(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sidecar, "ADDRESS", ("127.0.0.1", 1))
    monkeypatch.setattr(_sidecar, "PATIENCE", 0.1)
    result = sdk.checkpoint()
    assert (result.status, result.reason) == ("failed", "no_answer")


def test_proxy_variables_are_ignored(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert sdk.checkpoint().status == "created"


def test_hooks_run_before_in_the_original_and_after_in_the_copy(sidecar: Sidecar) -> None:
    calls: list[str] = []
    sdk.before_checkpoint(lambda: calls.append(f"before, {sidecar.posts} posts"))
    sdk.after_restore(lambda: calls.append("after"))
    sdk.checkpoint()
    assert calls == ["before, 0 posts"]
    sidecar.on_post = lambda: sidecar.restore()
    sdk.checkpoint()
    assert calls == ["before, 0 posts", "before, 1 posts", "after"]


def test_a_hook_that_raises_before_fails_the_checkpoint_and_nothing_else(
    sidecar: Sidecar, capfd: pytest.CaptureFixture[str]
) -> None:
    @sdk.before_checkpoint
    def close_pool() -> None:
        raise ConnectionError("the pool is busy")

    result = sdk.checkpoint()
    assert (result.status, result.reason, sidecar.posts) == ("failed", "hook", 0)
    assert "close_pool raised ConnectionError: the pool is busy" in result.message
    assert "Traceback" in capfd.readouterr().err


def test_hooks_after_a_restore_all_run_and_the_first_failure_is_raised(
    sidecar: Sidecar, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    @sdk.after_restore
    def reconnect() -> None:
        raise ConnectionError("nobody there")

    sdk.after_restore(lambda: calls.append("second"))
    sidecar.on_post = lambda: sidecar.restore()
    with pytest.raises(sdk.HookFailed, match="reconnect") as caught:
        sdk.checkpoint()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert calls == ["second"]


def test_coroutine_functions_are_refused_as_hooks() -> None:
    async def hook() -> None:
        await asyncio.sleep(0)

    with pytest.raises(TypeError, match="coroutine"):
        sdk.before_checkpoint(hook)


def test_a_forked_child_can_ask_while_its_parent_waits(sidecar: Sidecar) -> None:
    """The lock that a thread of the parent holds must not be inherited locked."""
    asked, answer = threading.Event(), threading.Event()

    def wait() -> dict[str, Any]:
        if sidecar.posts == 1:
            asked.set()
            answer.wait(10)
        return {"status": "created"}

    sidecar.on_post = wait
    thread = threading.Thread(target=sdk.checkpoint)
    thread.start()
    asked.wait(10)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if sdk.checkpoint().status == "created" else 1)
    deadline = time.monotonic() + 10
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    answer.set()
    thread.join()
    assert done == (pid, 0)


def test_refresh_env(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREETING", "hello")
    monkeypatch.setenv("TOKEN", "old")
    monkeypatch.setenv("SET_BY_THE_APP", "1")
    sidecar.env = {"GREETING": "hello", "TOKEN": "old"}

    def restored() -> None:
        sidecar.restore()
        sidecar.env = {"GREETING": "ciao", "NEW": "yes"}

    sidecar.on_post = restored
    sdk.checkpoint()
    assert os.environ["GREETING"] == "hello", "nothing changes behind the app's back"
    assert sdk.refresh_env() == {"GREETING": "ciao", "NEW": "yes", "TOKEN": None}
    assert os.environ["NEW"] == "yes"
    assert "TOKEN" not in os.environ
    assert os.environ["SET_BY_THE_APP"] == "1"
    monkeypatch.delenv("NEW")


def test_refresh_env_sets_the_time_zone(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    sidecar.env = {"TZ": "JST-9"}
    sdk.refresh_env()
    assert time.tzname[0] == "JST"
    monkeypatch.undo()
    time.tzset()


def test_a_restore_reseeds_unless_told_not_to(sidecar: Sidecar) -> None:
    sidecar.on_post = lambda: sidecar.restore("r-1")
    random.seed(1)
    state = random.getstate()
    sdk.checkpoint(reseed=False)
    assert random.getstate() == state
    sidecar.on_post = lambda: sidecar.restore("r-2")
    sdk.checkpoint()
    assert random.getstate() != state


def test_reseed_names_what_it_did_and_what_it_cannot() -> None:
    import ssl  # noqa: F401 - loaded is what counts

    random.seed(1)
    expected = random.random()
    random.seed(1)
    result = sdk.reseed()
    assert random.random() != expected
    assert {"random", "openssl"} <= set(result.done)
    assert any("hash seed" in note for note in result.notes)


def test_reseed_reaches_numpy_and_torch_when_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is a dependency of ours, so stand-ins with their documented function names take their place."""
    import sys
    import types

    calls: list[str] = []
    for name in ("numpy.random", "torch"):
        module = types.ModuleType(name)
        module.seed = lambda name=name: calls.append(name)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    result = sdk.reseed()
    assert calls == ["numpy.random", "torch"]
    assert {"numpy", "torch"} <= set(result.done)


def raises(*_: object) -> None:
    raise RuntimeError("half a module")


@pytest.mark.parametrize("name", ["random", "numpy.random", "torch", "_ssl"])
@pytest.mark.parametrize("kind", ["forbidden", "no function", "a value", "raises"])
def test_a_module_that_is_none_does_not_end_a_copy(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys
    import types

    called = {"random": "random", "numpy.random": "numpy", "torch": "torch", "_ssl": "openssl"}[name]
    module = types.ModuleType(name)
    if kind == "raises":
        module.__dict__.update(seed=raises, RAND_add=raises)
    entry = {"forbidden": None, "a value": 7}.get(kind, module)
    monkeypatch.setitem(sys.modules, name, entry)  # type: ignore[arg-type]
    result = sdk.reseed()
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert called not in result.done
    assert {"random", "openssl"} - {called} <= set(result.done), "the others are"
    assert any("hash seed" in note for note in result.notes)
    if kind == "forbidden":  # sys.modules["torch"] = None: not loaded, and it says so
        assert told == ""
    else:
        (line,) = told.splitlines()
        assert line.startswith(f"relume: {called}: could not be reseeded (")
        assert line.removeprefix("relume: ") in result.notes
    if kind == "raises":
        assert "RuntimeError: half a module" in told


@pytest.mark.parametrize("closed", [True, False])
def test_reseed_says_nothing_where_there_is_no_stderr(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    stderr = io.StringIO()
    stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr if closed else None)
    monkeypatch.setitem(sys.modules, "torch", 7)  # type: ignore[arg-type]
    assert "torch" not in sdk.reseed().done


def test_modules_that_are_not_loaded_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "numpy.random", raising=False)
    assert "numpy" not in sdk.reseed().done
    assert "numpy.random" not in sys.modules
