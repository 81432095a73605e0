"""A process under strace: cannot be saved, and the answer says which and why."""

from __future__ import annotations

from ask import Ask

TITLE = "a process under strace"
FAST = True
UNSUPPORTED = "sleep"  # the process that the answer names


def check(app: Ask) -> object:
    return app.status("/start.sh")
