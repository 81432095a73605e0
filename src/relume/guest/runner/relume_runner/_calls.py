"""Run the app's functions: at most so many at once, the others wait their turn.

All of a call is run in one place, so that what the app opens in one step it can use and close in the next:

- a coroutine function, and each step of an async generator to its ``aclose()``, in one task of its own.
  Context variables, time-outs and task groups around a ``yield`` belong to a task.
- any other function, and each ``next()`` of its generator to its ``close()``, on one thread and in one
  context. SQLite connections and ``torch.no_grad()`` belong to a thread.

Neither ends with the request. A call holds its slot and its thread until the app's code is really over: for
a stream, until its generator is closed, even when the client is long gone.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ._errors import AppError
from ._log import log

#: The id of the run that the current thread or task works for; empty outside of one.
run_id: contextvars.ContextVar[str] = contextvars.ContextVar("run_id", default="")

#: Of a step: (True, the chunk), (False, None) at the end, or what the app raised.
Outcome = tuple[bool, Any] | AppError

_END = object()


class Calls:
    """The slots and threads of one server."""

    def __init__(self, concurrency: int) -> None:
        self._slots = asyncio.Semaphore(concurrency)
        # One thread each. The one used last is taken first, so that few calls keep to few threads.
        self._idle: list[ThreadPoolExecutor] = []
        self._lives: set[asyncio.Task[None]] = set()  # an event loop alone does not keep its tasks

    async def begin(self) -> Call:
        """A call, as soon as a slot is free. It must be finished."""
        await self._slots.acquire()
        return Call(self)

    def live(self, call: Call, function: Callable[..., Any], *arguments: Any) -> asyncio.Task[None]:
        """Start the life of ``call`` in a task that no cancelled request takes along."""
        task = asyncio.get_running_loop().create_task(call.live(function, *arguments))
        self._lives.add(task)
        task.add_done_callback(self._lives.discard)
        return task

    def take_thread(self) -> ThreadPoolExecutor:
        return self._idle.pop() if self._idle else ThreadPoolExecutor(1, thread_name_prefix="call")

    def end(self, thread: ThreadPoolExecutor | None) -> None:
        """A call is over: its thread is idle, its slot free."""
        if thread is not None:
            self._idle.append(thread)
        self._slots.release()


class Call:
    """One call of a function. ``run`` it, take the chunks with ``next`` if it is ``streaming``, and
    ``finish`` it whatever happened."""

    def __init__(self, calls: Calls) -> None:
        #: The result of ``run`` is an iterator, whose items ``next`` gives.
        self.streaming = False
        self._calls = calls
        self._task: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._context = contextvars.copy_context()  # of the thread; a task has its own
        # The request asks for one step at a time: it makes the future and sets the event.
        self._answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked = asyncio.Event()
        self._awaiting = False  # the task is in a coroutine of the app's
        self._finished = False

    async def run(self, function: Callable[..., Any], positional: list[Any], named: dict[str, Any]) -> Any:
        """Call the function. Its result; None if that is an iterator. Raises AppError."""
        self._task = self._calls.live(self, function, positional, named)
        return await self._answer

    async def next(self) -> tuple[bool, Any]:
        """(True, the next chunk), or (False, None) at the end. Raises AppError.

        The generator is at most one chunk ahead of the client: no step is made that nobody asked for.
        """
        self._answer = asyncio.get_running_loop().create_future()
        self._asked.set()
        chunk: tuple[bool, Any] = await self._answer
        return chunk

    def finish(self) -> None:
        """Close the generator, then give slot and thread back, in the background. May be called twice.

        A coroutine is cancelled; a thread ends its step first.
        """
        if self._finished:
            return
        self._finished = True
        self._asked.set()
        if self._task is None:
            self._calls.end(None)
        elif self._awaiting:
            self._task.cancel()

    async def live(self, function: Callable[..., Any], positional: list[Any], named: dict[str, Any]) -> None:
        """All that happens to the app's code in this call, from begin to end."""
        iterator = None
        try:
            if self._finished:  # before it began
                return
            try:
                result = await self._result(function, positional, named)
            except AppError as error:
                self._tell(error)
            else:
                if isinstance(result, AsyncIterator | Iterator):
                    self.streaming = True
                    iterator, result = result, None
                self._tell(result)
            await self._serve(iterator)
            await self._close(iterator)
        finally:
            self._answer.cancel()  # if it still waits: only the end of the event loop leads here then
            self._calls.end(self._thread)

    async def _result(
        self, function: Callable[..., Any], positional: list[Any], named: dict[str, Any]
    ) -> Any:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            result = _call(function, *positional, **named)
        else:
            result = await self._on_thread(function, *positional, **named)
        if inspect.isawaitable(result):
            if self._finished and inspect.iscoroutine(result):
                result.close()
                return None
            result = await self._in_task(result)
        return result

    async def _serve(self, iterator: Any) -> None:
        """Make one step each time that one is asked for, until the call is finished."""
        ahead: Outcome | None = None
        more = True
        while True:
            try:
                await self._asked.wait()
            except asyncio.CancelledError as cancelled:
                # A time-out or a cancel scope around a yield ran out while the client took its time: that is
                # for the generator, which knows what to make of it.
                if not isinstance(iterator, AsyncGenerator):
                    raise
                if more:
                    ahead = await self._step(iterator, cancelled)
                    more = _is_chunk(ahead)
                continue
            if self._finished:
                return
            self._asked.clear()
            outcome, ahead = ahead or await self._step(iterator), None
            more = _is_chunk(outcome)
            self._tell(outcome)

    async def _step(self, iterator: Any, thrown: BaseException | None = None) -> Outcome:
        try:
            if thrown is not None and isinstance(iterator, AsyncGenerator):
                return True, await self._in_task(_call(iterator.athrow, thrown))
            if isinstance(iterator, AsyncIterator):
                return True, await self._in_task(_call(iterator.__anext__))
            chunk = await self._on_thread(next, iterator, _END)
            return (False, None) if chunk is _END else (True, chunk)
        except AppError as error:
            return (False, None) if isinstance(error.__cause__, StopAsyncIteration) else error

    async def _close(self, iterator: Any) -> None:
        try:
            if isinstance(iterator, AsyncIterator):
                if hasattr(iterator, "aclose"):
                    await self._in_task(_call(iterator.aclose))
            elif hasattr(iterator, "close"):
                await self._on_thread(iterator.close)
        except AppError as error:
            _log_unheard(error)

    def _tell(self, outcome: Any) -> None:
        """Give the waiting request its answer, if it still waits."""
        if self._answer.done():
            if isinstance(outcome, AppError):
                _log_unheard(outcome)
        elif isinstance(outcome, AppError):
            self._answer.set_exception(outcome)
        else:
            self._answer.set_result(outcome)

    async def _on_thread(self, function: Callable[..., Any], /, *positional: Any, **named: Any) -> Any:
        """Call it on the thread of this call. Raises AppError."""
        if self._thread is None:
            self._thread = self._calls.take_thread()
        step = functools.partial(self._context.run, _call, function, *positional, **named)
        return await asyncio.get_running_loop().run_in_executor(self._thread, step)

    async def _in_task(self, awaitable: Awaitable[Any]) -> Any:
        """Await it in the task of this call. Raises AppError."""
        self._awaiting = True
        try:
            return await awaitable
        except BaseException as error:
            raise AppError from error
        finally:
            self._awaiting = False


def _call(function: Callable[..., Any], /, *positional: Any, **named: Any) -> Any:
    """The call, with whatever it raises wrapped: a StopIteration may not pass through a future, a
    CancelledError would pass for a cancellation, and an exit() in one call is no reason to end the server."""
    try:
        return function(*positional, **named)
    except BaseException as error:
        raise AppError from error


def _is_chunk(outcome: Outcome) -> bool:
    return not isinstance(outcome, AppError) and outcome[0]


def _log_unheard(error: AppError) -> None:
    """What the app raised when its request was gone."""
    if not _is_end(error.__cause__):
        log.error(
            "run_id=%s the app raised %s while it was closed\n%s", run_id.get(), error.name, error.report()
        )


def _is_end(error: BaseException | None) -> bool:
    """Being closed or cancelled is all that it says; a task group around a yield makes a group of that."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return True
    parts = getattr(error, "exceptions", None)  # of a BaseExceptionGroup, which Python 3.10 does not have
    return parts is not None and all(map(_is_end, parts))
