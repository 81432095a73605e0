"""``checkpoint()``: the request for a checkpoint, done right, and the hooks around it.

The same line of code returns in two worlds. In the container that asked, the sidecar answers. In every copy
made from the checkpoint the connection of that request is dead, and the call ends with an exception. But a
connection can die for other reasons, so the exception alone proves nothing: whether this is a copy is
decided by the ``restore_id`` of ``GET /status``, asked before the request and after it.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, TypeVar  # noqa: UP035 - those of collections.abc need Python 3.9

from . import _environment, _randomness, _sidecar

Hook = TypeVar("Hook", bound=Callable[[], Any])

_before: list[Callable[[], Any]] = []
_after: list[Callable[[], Any]] = []

_handled: str | None = None

# One request at a time in this process: the hooks of two would run into each other.
_turn = threading.Lock()


def _fresh_lock() -> None:
    global _turn
    _turn = threading.Lock()


# A process forked while a thread of its parent waits in checkpoint() has a lock that nobody will release.
os.register_at_fork(after_in_child=_fresh_lock)


class HookFailed(RuntimeError):
    """An ``@after_restore`` hook raised. All other hooks have run; the cause is the first exception.

    Let it end the process: an app whose pool or client could not be made again should not serve.
    """


@dataclass(frozen=True)
class Checkpoint:
    """What became of a request for a checkpoint.

    ``status``: ``created``, ``skipped`` or ``failed`` as the sidecar answered; ``restored`` in a copy;
    ``outside`` where there is no relume. ``reason`` is the sidecar's stable word (``exists``,
    ``insufficient_memory``, ...), or ``hook``, ``timeout``, ``no_answer`` for what failed on this side;
    ``message`` says it in words.
    """

    status: str
    #: True in the copies, for the call during which the restore happened; False for a later call in a copy.
    restored: bool = False
    reason: str = ""
    message: str = ""
    checkpoint_id: str | None = None
    #: The id of this restore, another one in every copy; None in a container that was booted.
    restore_id: str | None = None
    #: What this container was started with. ``os.environ`` of a copy is still the old one; see
    #: ``refresh_env``.
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: The sidecar's whole answer; empty in a copy, which got none.
    answer: Mapping[str, Any] = field(default_factory=dict, repr=False)


def _plain_function(hook: Hook) -> Hook:
    if inspect.iscoroutinefunction(hook):
        raise TypeError(f"{hook!r} is a coroutine function; hooks are called, not awaited")
    return hook


def before_checkpoint(hook: Hook) -> Hook:
    """Decorator: call ``hook()`` before each request, in the order of registration (close pools, let work
    end).

    One that raises makes the checkpoint ``failed`` with reason ``hook``: no request is sent, later hooks
    are not called, and the app goes on.
    """
    _before.append(_plain_function(hook))
    return hook


def after_restore(hook: Hook) -> Hook:
    """Decorator: call ``hook()`` in every copy, once ``checkpoint()`` has noticed the restore and reseeded.

    In the order of registration, and not in the container that was checkpointed: what both need goes behind
    the call of ``checkpoint()``.
    """
    _after.append(_plain_function(hook))
    return hook


def checkpoint(timeout: float = 300.0, *, reseed: bool = True) -> Checkpoint:
    """Ask for a checkpoint of this container, wait until it is made, and say what happened.

    Returns in the container that asked, and once in every copy made from the checkpoint, now or in a year,
    with ``restored=True``. Never raises for a checkpoint that could not be made; ``HookFailed`` when a hook
    of a copy raised. Outside relume it returns at once with status ``outside``.

    ``timeout``: seconds without a word from the sidecar; the freeze takes as long as the memory takes to
    write. ``reseed``: in a copy, call ``reseed()`` before the hooks. Blocks; from a coroutine use ``await
    asyncio.to_thread(relume.checkpoint)``.
    """
    if not _sidecar.present():
        return Checkpoint("outside", message="this is no relume container", environment=dict(os.environ))
    with _turn:
        return _checkpoint(timeout, reseed)


def _checkpoint(timeout: float, reseed: bool) -> Checkpoint:
    try:
        before = _sidecar.status()
        _environment.remember(_environment.read())
    except _sidecar.NoAnswer as error:
        return Checkpoint("failed", reason="no_answer", message=str(error), environment=dict(os.environ))

    for hook in _before:
        try:
            hook()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            name = getattr(hook, "__qualname__", repr(hook))
            return _result(
                "failed", before, reason="hook", message=f"{name} raised {type(error).__name__}: {error}"
            )

    answer: dict[str, Any] = {}
    silence: _sidecar.NoAnswer | None = None
    try:
        answer = _sidecar.call("POST", "/checkpoint", timeout)
    except _sidecar.NoAnswer as error:
        silence = error
    try:
        after = _sidecar.status()
    except _sidecar.NoAnswer as error:
        # Neither world can be proven. Saying "not restored" is the safer mistake: nothing is undone twice.
        return Checkpoint(
            "failed", reason="no_answer", message=str(error), environment=dict(os.environ), answer=answer
        )

    if after.get("restore_id") != before.get("restore_id"):
        return _restored(after, reseed)
    if silence is not None:
        reason = "timeout" if silence.timed_out else "no_answer"
        return _result("failed", after, reason=reason, message=str(silence))
    return _result(
        str(answer.get("status", "failed")),
        after,
        reason=str(answer.get("reason") or ""),
        message=str(answer.get("message") or ""),
        answer=answer,
    )


def handled() -> str | None:
    """The ``restore_id`` of the copy in which ``checkpoint()`` last ended: what a restore calls for is done
    there, and the runner leaves it alone."""
    return _handled


def _restored(status: dict[str, Any], reseed: bool) -> Checkpoint:
    global _handled
    _handled = str(status["restore_id"])
    if reseed:
        _randomness.reseed()
    first: Exception | None = None
    failed: list[str] = []
    for hook in _after:
        try:
            hook()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            failed.append(getattr(hook, "__qualname__", repr(hook)))
            first = first or error
    if first is not None:
        raise HookFailed(f"after_restore hooks raised: {', '.join(failed)}") from first
    return _result("restored", status)


def _result(
    outcome: str,
    status: dict[str, Any],
    *,
    reason: str = "",
    message: str = "",
    answer: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A Checkpoint with what ``status`` says about this container, and its environment."""
    try:
        environment = _environment.read()
    except _sidecar.NoAnswer:
        environment = dict(os.environ)
    answer = answer or {}
    checkpoint_id = answer.get("checkpoint_id") or status.get("checkpoint_id")
    return Checkpoint(
        outcome,
        restored=outcome == "restored",
        reason=reason,
        message=message,
        checkpoint_id=str(checkpoint_id) if checkpoint_id else None,
        restore_id=str(status["restore_id"]) if status.get("restored") else None,
        environment=environment,
        answer=answer,
    )
