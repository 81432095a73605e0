"""Where the app's code runs: one task or one thread for all of a call, whatever becomes of the request."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import pytest

from relume.guest.runner.relume_runner._calls import Call, Calls
from relume.guest.runner.relume_runner._errors import AppError
from relume.guest.runner.relume_runner._log import log

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="outside")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "error", lambda form, *values: lines.append(form % values))
    return lines


async def start(calls: Calls, function: Callable[..., Any], *arguments: Any) -> tuple[Call, Any]:
    call = await calls.begin()
    return call, await call.run(function, list(arguments), {})


async def chunks(call: Call) -> list[Any]:
    """Each asked for from another task, as a server may do it."""
    found = []
    while True:
        more, chunk = await asyncio.create_task(call.next())
        if not more:
            return found
        found.append(chunk)


async def over(calls: Calls) -> None:
    """Wait until all that was finished has really ended."""
    async with asyncio.timeout(5):
        while calls._lives:
            await asyncio.wait(set(calls._lives))


async def test_an_async_generator_lives_in_one_task() -> None:
    places: list[object] = []

    async def generator() -> AsyncIterator[str]:
        token = VARIABLE.set("inside")
        try:
            async with asyncio.timeout(60), anyio.create_task_group() as group:
                group.start_soon(asyncio.sleep, 0)
                for _ in range(3):
                    places.append(asyncio.current_task())
                    yield VARIABLE.get()
        finally:
            VARIABLE.reset(token)  # a ValueError in another context
            places.append(asyncio.current_task())

    calls = Calls(1)
    call, _ = await start(calls, generator)
    assert call.streaming
    assert await chunks(call) == ["inside"] * 3
    call.finish()
    await over(calls)
    assert len(places) == 4
    assert len(set(places)) == 1


async def test_an_async_generator_is_closed_in_its_task(logged: list[str]) -> None:
    places: list[object] = []

    async def generator() -> AsyncIterator[int]:
        token = VARIABLE.set("inside")
        places.append(asyncio.current_task())
        try:
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(60))
                yield 1
        finally:
            await asyncio.sleep(0)
            VARIABLE.reset(token)
            places.append(asyncio.current_task())

    calls = Calls(1)
    call, _ = await start(calls, generator)
    assert await call.next() == (True, 1)
    call.finish()
    call.finish()
    await over(calls)
    assert len(places) == 2
    assert len(set(places)) == 1
    assert logged == []


async def test_a_generator_lives_on_one_thread_and_in_one_context(logged: list[str]) -> None:
    threads: list[int] = []

    def generator() -> Iterator[str]:
        threads.append(threading.get_ident())
        with contextlib.closing(sqlite3.connect(":memory:")) as database:  # refuses every other thread
            token = VARIABLE.set("inside")
            try:
                for (one,) in database.execute("SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3"):
                    threads.append(threading.get_ident())
                    yield f"{VARIABLE.get()} {one}"
            finally:
                VARIABLE.reset(token)
                threads.append(threading.get_ident())

    def function() -> Iterator[str]:
        threads.append(threading.get_ident())
        return generator()

    async def other() -> None:
        """Takes and gives back threads in between."""
        call, _ = await start(calls, threading.get_ident)
        call.finish()

    calls = Calls(4)
    for closed_early in (False, True):
        threads.clear()
        call, _ = await start(calls, function)
        await other()
        assert await call.next() == (True, "inside 1")
        await asyncio.gather(*(other() for _ in range(3)))
        if not closed_early:
            assert await chunks(call) == ["inside 2", "inside 3"]
        call.finish()
        await over(calls)
        assert len(threads) == (4 if closed_early else 6)
        assert len(set(threads)) == 1
    assert logged == []


async def test_a_cancelled_request_keeps_slot_and_thread_until_the_function_is_over() -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        may_end.wait(5)

    calls = Calls(1)
    call = await calls.begin()
    request = asyncio.create_task(call.run(slow, [], {}))
    await asyncio.to_thread(begun.wait, 5)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    call.finish()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(calls.begin(), 0.05)
    may_end.set()
    await over(calls)
    _, result = await start(calls, lambda: "free")
    assert result == "free"


async def test_threads_are_made_as_they_are_needed_and_used_again() -> None:
    calls = Calls(8)
    seen = set()
    for _ in range(5):
        call, thread = await start(calls, threading.get_ident)
        call.finish()
        await over(calls)
        seen.add(thread)
    assert len(seen) == 1
    at_once = [await start(calls, threading.get_ident) for _ in range(3)]
    assert len({thread for _, thread in at_once}) == 3
    for call, _ in at_once:
        call.finish()
    await over(calls)


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit])
async def test_whatever_the_app_raises_is_the_apps(kind: type[BaseException]) -> None:
    def function() -> None:
        raise kind

    async def coroutine() -> None:
        raise kind

    def generator() -> Iterator[int]:
        yield 1
        raise kind

    async def async_generator() -> AsyncIterator[int]:
        yield 1
        raise kind

    calls = Calls(1)
    for plain in (function, coroutine):
        call = await calls.begin()
        with pytest.raises(AppError) as caught:
            await call.run(plain, [], {})
        assert type(caught.value.__cause__) is kind
        call.finish()
        await over(calls)
    for streamed in (generator, async_generator):
        call, _ = await start(calls, streamed)
        assert await call.next() == (True, 1)
        with pytest.raises(AppError) as caught:
            await call.next()
        assert type(caught.value.__cause__) is kind
        call.finish()
        await over(calls)
    assert not calls._slots.locked()


async def test_finish_cancels_a_coroutine_and_nothing_is_made_of_it(logged: list[str]) -> None:
    ended = []

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(asyncio.current_task())

    async def stream() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(asyncio.current_task())

    calls = Calls(1)
    call = await calls.begin()
    request = asyncio.create_task(call.run(waits, [], {}))
    await asyncio.sleep(0.01)
    request.cancel()
    call.finish()
    await over(calls)

    call, _ = await start(calls, stream)
    await call.next()
    request = asyncio.create_task(call.next())
    await asyncio.sleep(0.01)
    request.cancel()
    call.finish()
    await over(calls)
    assert len(ended) == 2
    assert logged == []
    assert not calls._slots.locked()


async def test_what_a_generator_raises_while_it_is_closed_is_in_the_log(logged: list[str]) -> None:
    async def async_generator() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ValueError("cannot end")

    def generator() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise ValueError("cannot end")

    calls = Calls(1)
    for function in (async_generator, generator):
        call, _ = await start(calls, function)
        await call.next()
        call.finish()
        await over(calls)
    assert len(logged) == 2
    for line in logged:
        assert "ValueError: cannot end" in line
        assert "relume_runner" not in line, "only the app's own frames"


@pytest.mark.parametrize("scope", ["asyncio", "anyio"])
async def test_a_time_out_around_a_yield_runs_out_at_the_yield(scope: str) -> None:
    """While the client takes its time: the generator gets the TimeoutError, not the server a cancellation."""
    seen = []

    async def generator() -> AsyncIterator[str]:
        try:
            if scope == "asyncio":
                async with asyncio.timeout(0.01):
                    yield "first"
            else:
                with anyio.fail_after(0.01):
                    yield "first"
        except TimeoutError:
            seen.append(asyncio.current_task())
            yield "too late"

    calls = Calls(1)
    call, _ = await start(calls, generator)
    assert await call.next() == (True, "first")
    await asyncio.sleep(0.1)
    assert len(seen) == 1
    assert await chunks(call) == ["too late"]
    call.finish()
    await over(calls)
    assert not calls._slots.locked()


async def test_a_time_out_that_nobody_catches_is_the_next_answer() -> None:
    async def generator() -> AsyncIterator[str]:
        async with asyncio.timeout(0.01):
            yield "first"

    calls = Calls(1)
    call, _ = await start(calls, generator)
    await call.next()
    await asyncio.sleep(0.1)
    with pytest.raises(AppError) as caught:
        await call.next()
    assert isinstance(caught.value.__cause__, TimeoutError)
    call.finish()
    await over(calls)


async def test_no_step_is_made_that_nobody_asked_for() -> None:
    made = []

    async def async_generator() -> AsyncIterator[int]:
        for i in range(9):
            made.append(i)
            yield i

    def generator() -> Iterator[int]:
        for i in range(9):
            made.append(i)
            yield i

    calls = Calls(1)
    for function in (async_generator, generator):
        made.clear()
        call, _ = await start(calls, function)
        assert made == []
        await call.next()
        await asyncio.sleep(0.02)
        assert made == [0]
        call.finish()
        await over(calls)


async def test_a_function_may_give_a_coroutine_or_an_iterator_of_the_other_kind() -> None:
    async def async_generator() -> AsyncIterator[int]:
        yield 1

    async def coroutine(result: Any) -> Any:
        return result

    calls = Calls(1)
    call, result = await start(calls, lambda: coroutine("made in a thread"))
    assert result == "made in a thread"
    call.finish()
    for function in (lambda: async_generator(), lambda: coroutine(async_generator()), lambda: iter([1])):
        call, _ = await start(calls, function)
        assert await chunks(call) == [1]
        call.finish()
    await over(calls)


async def test_a_coroutine_that_comes_too_late_is_not_run() -> None:
    """A warning of its own, which is an error here, would say that it was never awaited."""
    ran = []
    late = threading.Event()

    async def coroutine() -> None:
        ran.append(1)

    def function() -> Any:
        late.wait()
        return coroutine()

    calls = Calls(1)
    call = await calls.begin()
    request = asyncio.create_task(call.run(function, [], {}))
    await asyncio.sleep(0.01)
    request.cancel()
    call.finish()
    late.set()
    await over(calls)
    assert ran == []


async def test_a_request_that_is_cancelled_at_once_calls_nothing() -> None:
    ran = []

    async def coroutine() -> None:
        ran.append(1)

    calls = Calls(1)
    for function in (coroutine, lambda: ran.append(2)):
        call = await calls.begin()
        request = asyncio.create_task(call.run(function, [], {}))
        asyncio.get_running_loop().call_soon(request.cancel)
        asyncio.get_running_loop().call_soon(call.finish)
        await asyncio.wait([request])
        await over(calls)
    call = await calls.begin()
    call.finish()
    assert ran == []
    assert not calls._slots.locked()
