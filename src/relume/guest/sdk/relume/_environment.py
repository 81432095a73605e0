"""The environment that a container was started with, after its memory came from another one.

A restored process still has the environment of the container that was checkpointed; relume does not change
memory behind an app's back. ``GET /env`` has the new one, and these functions bring it in where it is wanted.
"""

from __future__ import annotations

import os
import time

from . import _sidecar

# The names that the endpoint gave when it was last asked: a variable that it no longer has was taken away by
# whoever started this container, while others in os.environ were set by the app itself and stay.
_given: set[str] = set()


def read() -> dict[str, str]:
    """The environment this container was started with. Outside relume, this process's own. Raises
    NoAnswer."""
    if not _sidecar.present():
        return dict(os.environ)
    return {str(name): str(value) for name, value in _sidecar.call("GET", "/env", timeout=5.0).items()}


def remember(environment: dict[str, str]) -> None:
    """Take ``environment`` as what the endpoint gave, for the next ``refresh_env``."""
    _given.clear()
    _given.update(environment)


def refresh_env() -> dict[str, str | None]:
    """Make ``os.environ`` that of this container; return what changed (None: the variable is gone).

    Variables that the app set itself stay. What was read from the environment before (a client made with an
    API key) is not changed by this; make such objects anew in an ``@after_restore`` hook. Raises OSError
    when the sidecar does not answer; outside relume nothing changes.
    """
    try:
        fresh = read()
    except _sidecar.NoAnswer as error:
        raise OSError(f"relume: the environment could not be read: {error}") from error
    changed: dict[str, str | None] = {
        name: value for name, value in fresh.items() if os.environ.get(name) != value
    }
    changed.update({name: None for name in _given if name in os.environ and name not in fresh})
    for name, value in changed.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    remember(fresh)
    if "TZ" in changed:
        time.tzset()
    return changed
