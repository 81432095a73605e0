"""Run the app's functions: at most so many at once, the others wait their turn.

Coroutine functions and async generators run on the event loop, all else in a pool of threads. A call holds
its slot until it is really over: for a stream, until its generator is closed, even when the client is long
gone.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

log = logging.getLogger("relume")

#: The id of the run that the current thread or task works for; empty outside of one.
run_id: contextvars.ContextVar[str] = contextvars.ContextVar("run_id", default="")

_END = object()


class AppError(Exception):
    """The app's function raised. ``__cause__`` is what it raised."""


class Calls:
    """The slots and threads of one server."""

    def __init__(self, concurrency: int) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        self._pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="call")
        self._closing: set[asyncio.Task[None]] = set()

    async def run(
        self, function: Callable[..., Any], positional: list[Any], named: dict[str, Any]
    ) -> tuple[Any, Stream | None]:
        """Call the function when a slot is free. Returns its result and None, or None and a Stream if the
        result is an iterator; the stream must be finished. Raises AppError."""
        await self._slots.acquire()
        stream = None
        try:
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                result = _call(function, positional, named)
            else:
                result = await self.in_thread(contextvars.copy_context(), _call, function, positional, named)
            if inspect.isawaitable(result):
                result = await _awaited(result)
            if isinstance(result, AsyncIterator | Iterator):
                stream = Stream(self, result)
                return None, stream
            return result, None
        finally:
            if stream is None:
                self._slots.release()

    async def in_thread(
        self, context: contextvars.Context, function: Callable[..., Any], *arguments: Any
    ) -> Any:
        """``function(*arguments)`` in the pool; the step goes on to its end though the waiting task is
        cancelled."""
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, lambda: context.run(function, *arguments)
        )

    def close_later(self, closing: Coroutine[Any, Any, None]) -> None:
        """Run ``closing``, then free the slot, in a task that no cancelled request takes along."""

        async def close() -> None:
            try:
                await closing
            except Exception:
                log.exception("a generator of the app raised while it was closed")
            finally:
                self._slots.release()

        task = asyncio.get_running_loop().create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class Stream:
    """The chunks of a generator, one at a time."""

    def __init__(self, calls: Calls, iterator: AsyncIterator[Any] | Iterator[Any]) -> None:
        self._calls = calls
        self._iterator = iterator
        # One context for all steps, though each may run in another thread.
        self._context = contextvars.copy_context()
        self._step: asyncio.Future[Any] | None = None
        self._finished = False

    async def next(self) -> tuple[bool, Any]:
        """(True, the next chunk), or (False, None) at the end. Raises AppError."""
        if isinstance(self._iterator, AsyncIterator):
            try:
                return True, await _awaited(self._iterator.__anext__())
            except AppError as error:
                if isinstance(error.__cause__, StopAsyncIteration):
                    return False, None
                raise
        step = self._calls.in_thread(self._context, _call, next, [self._iterator, _END], {})
        self._step = asyncio.ensure_future(step)
        chunk = await asyncio.shield(self._step)
        return (False, None) if chunk is _END else (True, chunk)

    def finish(self) -> None:
        """Close the generator and free the slot, in the background. May be called twice."""
        if not self._finished:
            self._finished = True
            self._calls.close_later(self._close())

    async def _close(self) -> None:
        if isinstance(self._iterator, AsyncIterator):
            if hasattr(self._iterator, "aclose"):
                await self._iterator.aclose()
            return
        if self._step is not None:
            await asyncio.wait([self._step])  # a generator that runs cannot be closed
        if hasattr(self._iterator, "close"):
            await self._calls.in_thread(self._context, self._iterator.close)


def _call(function: Callable[..., Any], positional: list[Any], named: dict[str, Any]) -> Any:
    """The call, with whatever it raises wrapped: a StopIteration may not pass through a future, and an exit()
    in one call is no reason to end the server."""
    try:
        return function(*positional, **named)
    except (Exception, SystemExit) as error:
        raise AppError from error


async def _awaited(awaitable: Any) -> Any:
    try:
        return await awaitable
    except (Exception, SystemExit) as error:
        raise AppError from error
