"""Ending work early without leaving it half done: threads that stop when asked, clean-ups that finish.

Cancelling an asyncio task does not stop a thread it waits for, and a clean-up that awaits can itself be
cancelled. A build must not leave either behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """Raised inside a thread by its ``check`` once the task that waits for it was cancelled."""


async def in_thread(function: Callable[[Callable[[], None]], T]) -> T:
    """Run ``function(check)`` in a thread. On cancellation ``check`` raises there, and its end is awaited."""
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Interrupted

    work = asyncio.ensure_future(asyncio.to_thread(function, check))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # read, so that nobody complains about an error no one fetched
        raise


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work`` whatever happens to the waiting task; a cancellation is raised again afterwards."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:  # raised by result() below
            break
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()
