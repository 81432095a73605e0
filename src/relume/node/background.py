"""Work that goes on beside everything else, and that nobody waits for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from relume.errors import RelumeError

log = logging.getLogger(__name__)


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
        """Cancel what still goes on, and wait for that."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _report(task: asyncio.Task[Any]) -> None:
    """A RelumeError has been said where it was raised."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, RelumeError):
        log.error("background work failed", exc_info=error)
