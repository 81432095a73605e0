"""When a request for a checkpoint is skipped. The order is the contract: the first rule that applies names
the reason."""

from __future__ import annotations

import dataclasses
from typing import Literal

SkipReason = Literal["disabled", "restored", "deferred", "exists", "in_progress"]


@dataclasses.dataclass(frozen=True, slots=True)
class Situation:
    """What is known of the instance that asks, and of its build on this platform."""

    checkpointing: bool
    """``[cerebrium.experimental] checkpointing`` of the build."""
    restored: bool
    """The instance is itself a copy."""
    deferred: bool
    """It was booted because a restore failed: somebody waits for it, so it must not be held up."""
    exists: bool
    """A usable checkpoint of this build and platform is there."""
    in_progress: bool
    """Another instance of the build is at it."""


def skip(situation: Situation) -> SkipReason | None:
    """The reason not to make a checkpoint, or None to make one."""
    if not situation.checkpointing:
        return "disabled"
    if situation.restored:
        return "restored"
    if situation.deferred:
        return "deferred"
    if situation.exists:
        return "exists"
    if situation.in_progress:
        return "in_progress"
    return None
