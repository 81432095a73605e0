"""Work that goes on beside everything else, and that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from relume.errors import RelumeError

log = logging.getLogger(__name__)

_PATIENCE = 5.0


class Background:
    """Keeps tasks alive (asyncio itself refers to them only weakly); what one raises is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` beside everything else."""
        task = asyncio.create_task(work)
        self.keep(task)
        return task

    def keep(self, task: asyncio.Task[Any]) -> None:
        """See a task through that somebody else made."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)

    async def close(self) -> None:
        """Cancel what still goes on, and wait for that; not for ever, since some of it waits for a store.

        What is left then ends with the process, as it would in a power failure: the next run takes it up.
        """
        if not self._tasks:
            return
        for task in self._tasks:
            task.cancel()
        _, left = await asyncio.wait(self._tasks, timeout=_PATIENCE)
        if left:
            log.warning(
                "%d pieces of background work did not end in %.0f s, and are cut", len(left), _PATIENCE
            )


def _report(task: asyncio.Task[Any]) -> None:
    """A RelumeError has been said where it was raised."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, RelumeError):
        log.error("background work failed", exc_info=error)
