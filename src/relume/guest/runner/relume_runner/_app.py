"""The HTTP side: routes, answers, and one log line for each run.

An answer is ``{"run_id", "result", "run_time_ms"}``, as on Cerebrium; an error ``{"run_id", "error":
{"code", "message"}}``. What the app raised stays in the log, under the run's id: a traceback tells a
stranger too much.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any

import anyio._backends._asyncio  # noqa: F401 - loaded on first use otherwise, after the checkpoint
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ._arguments import BadArguments, Parameters, parse
from ._calls import Call, Calls, run_id
from ._errors import AppError
from ._log import log
from ._restore import RestoreWatch
from ._results import NotJson, as_event, as_json

#: Bytes of a request's body. A body is held in memory, and the container has only so much.
BODY_LIMIT = 256 * 1024 * 1024

# Clients of OpenAI-compatible apps take the function's address as their base URL and append these.
_OPENAI = ("chat/completions", "completions", "embeddings")

_WITHOUT_BODY = (204, 205, 304)  # RFC 9110, 15.3.5, 15.3.6 and 15.4.5

Function = Callable[..., Any]


class App:
    """The ASGI application. ``serve`` gives it the functions, once there are any."""

    def __init__(self, concurrency: int) -> None:
        self._functions: dict[str, tuple[Function, Parameters]] = {}
        self._calls = Calls(concurrency)
        self._watch: RestoreWatch | None = None
        call = self._call
        self._starlette = Starlette(
            routes=[
                Route("/", self._index),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/{function}", call, methods=["POST"]),
                *(Route(f"/{{function}}/{suffix}", call, methods=["POST"]) for suffix in _OPENAI),
            ],
            exception_handlers={HTTPException: _http_error},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._starlette(scope, receive, send)

    def serve(self, functions: Mapping[str, Function], watch: RestoreWatch) -> None:
        """Offer ``functions``; from now on the server is ready."""
        self._functions = {name: (function, Parameters(function)) for name, function in functions.items()}
        self._watch = watch

    async def _index(self, request: Request) -> Response:
        return _json({"functions": {name: str(takes) for name, (_, takes) in self._functions.items()}})

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        ready = bool(self._functions)
        return _json({"status": "ready" if ready else "starting"}, 200 if ready else 503)

    async def _call(self, request: Request) -> ASGIApp:
        if self._watch is not None and self._watch.check():
            log.info("this container was restored from a checkpoint")
        run = str(uuid.uuid4())
        run_id.set(run)
        name = request.path_params["function"]
        if name not in self._functions:
            offered = ", ".join(sorted(self._functions))
            return _error(run, 404, "no_function", f"there is no function {name!r}; there are: {offered}")
        function, parameters = self._functions[name]
        try:
            positional, named = parameters.bind(parse(await _body(request)), run)
        except BadArguments as error:
            log.info("run_id=%s POST /%s %d: %s", run, name, error.status, error)
            return _error(run, error.status, "bad_arguments", str(error), problems=error.problems)
        except AppError as error:
            return _raised(run, error)
        except ClientDisconnect:
            return Response(status_code=499)

        started = time.perf_counter()
        with contextlib.ExitStack() as held:
            call = await self._calls.begin()
            held.callback(call.finish)
            try:
                result = await call.run(function, positional, named)
                if call.streaming:
                    # The first chunk is awaited here: what fails before it gets a proper status.
                    first = await call.next()
                    return _Events(run, name, call, first, held.pop_all())
                if isinstance(result, Response):
                    result.headers["X-Run-Id"] = run
                    return _PassedOn(run, name, result, held.pop_all())
                response = _answer(run, result, (time.perf_counter() - started) * 1000)
            except AppError as error:
                response = _raised(run, error)
            except NotJson as error:
                log.error("run_id=%s POST /%s: %s", run, name, error)
                response = _error(run, 500, "not_json", f"{name} returned what JSON cannot hold: {error}")
        _log_answer(run, name, response.status_code, started)
        return response


class _PassedOn:
    """A response that the app made, and the call it holds until all of it is sent."""

    def __init__(self, run: str, name: str, response: Response, held: contextlib.ExitStack) -> None:
        self._run = run
        self._name = name
        self._response: Any = response
        if hasattr(self._response, "body_iterator"):
            self._response.body_iterator = _guarded(self._response.body_iterator)
        self._held = held
        self._started = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                await self._response(scope, receive, send)
            except (SystemExit, KeyboardInterrupt) as error:  # of a background task
                raise AppError from error
            finally:
                _log_answer(self._run, self._name, self._response.status_code, self._started)


async def _guarded(body: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """An exit() in the middle of a body would end the server: it is raised in a task of Starlette's."""
    try:
        async for chunk in body:
            yield chunk
    except (SystemExit, KeyboardInterrupt) as error:
        raise AppError from error


class _Events(StreamingResponse):
    """A stream of server-sent events. Its generator is closed whatever becomes of the client."""

    def __init__(
        self, run: str, name: str, call: Call, first: tuple[bool, Any], held: contextlib.ExitStack
    ) -> None:
        super().__init__(
            self._events(first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Run-Id": run},
        )
        self._run = run
        self._name = name
        self._call = call
        self._held = held
        self._started = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                _log_answer(self._run, self._name, "stream", self._started)

    async def _events(self, first: tuple[bool, Any]) -> AsyncIterator[bytes]:
        more, chunk = first
        try:
            while more:
                yield as_event(chunk)
                more, chunk = await self._call.next()
        except AppError as error:
            # The status is long sent. An event of its own is all that can still be said.
            message = _log_raised(self._run, error)
            yield b"event: error\n" + as_event(_error_body(self._run, "exception", message))
        except NotJson as error:
            log.error("run_id=%s POST /%s: %s", self._run, self._name, error)
            yield b"event: error\n" + as_event(_error_body(self._run, "not_json", f"a chunk: {error}"))


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_LIMIT:
            raise BadArguments(413, f"the body is larger than {BODY_LIMIT} bytes")
    return bytes(body)


def _answer(run: str, result: Any, elapsed_ms: float) -> Response:
    # As on Cerebrium, a status_code in the result is the answer's.
    status = result.get("status_code", 200) if isinstance(result, dict) else 200
    if not isinstance(status, int) or not 200 <= status <= 599:
        status = 200
    if status in _WITHOUT_BODY:
        return Response(status_code=status, headers={"X-Run-Id": run})
    content = b'{"run_id":%s,"result":%s,"run_time_ms":%s}' % (
        as_json(run),
        as_json(result),
        as_json(round(elapsed_ms, 3)),
    )
    return Response(content, status, {"X-Run-Id": run}, media_type="application/json")


def _log_answer(run: str, name: str, answer: int | str, started: float) -> None:
    log.info("run_id=%s POST /%s %s %.1f ms", run, name, answer, (time.perf_counter() - started) * 1000)


def _raised(run: str, error: AppError) -> Response:
    return _error(run, 500, "exception", _log_raised(run, error))


def _log_raised(run: str, error: AppError) -> str:
    """Put the traceback into the log; what the client may know of it."""
    log.error("run_id=%s the app raised %s\n%s", run, error.name, error.report())
    return f"the app raised {error.name}; its log has the traceback under this run_id"


def _error_body(run: str, code: str, message: str, **details: Any) -> dict[str, Any]:
    return {"run_id": run, "error": {"code": code, "message": message, **details}}


def _error(run: str, status: int, code: str, message: str, **details: Any) -> Response:
    return _json(_error_body(run, code, message, **details), status, {"X-Run-Id": run})


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Not Starlette's: that cannot write half a surrogate pair, as a name in a body may have."""
    return Response(as_json(content), status, dict(headers or {}), media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in the shape of all errors."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    body = {"error": {"code": codes.get(error.status_code, "http"), "message": error.detail}}
    return _json(body, error.status_code, error.headers)
