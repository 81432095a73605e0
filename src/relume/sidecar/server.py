"""The sidecar: ``POST /checkpoint``, ``GET /status``, ``GET /env``, and nothing else.

It runs in the keeper on a listening socket that lies inside the instance's network namespace, so nobody but
the instance can reach it. What it serves is an app's memory of unknown quality: headers, body, time and
number of connections are bounded; every answer is JSON; a caller that hangs up takes nobody down.

HTTP is h11's, not aiohttp's: there is one of these for each instance, and h11 is a hundredth of the memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import h11

ADDRESS = "169.254.169.253"
PORT = 8234

_PIECE = 16 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """``header_bytes`` of one request's head, ``body_bytes`` of its body; ``read_s`` from a request's first byte
    to its last, and for the caller to take the answer; ``idle_s`` between two requests of a connection;
    ``connections`` at once (as many again are told so, more are dropped)."""

    header_bytes: int = 16 * 1024
    body_bytes: int = 64 * 1024
    read_s: float = 10.0
    idle_s: float = 30.0
    connections: int = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP status and a JSON body, and headers beside the ones that every answer has."""

    status: int
    body: Any
    headers: tuple[tuple[str, str], ...] = ()


class _Refused(Exception):
    """The request is not acceptable; the connection is closed after the answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.answer = _error(status, code, message)


Handler = Callable[[], Awaitable[Answer]]


class Sidecar:
    """Serves ``checkpoint``, ``status`` and ``env`` (coroutine functions that give an :class:`Answer`)."""

    def __init__(
        self, *, checkpoint: Handler, status: Handler, env: Handler, limits: Limits = Limits()
    ) -> None:
        self._routes: dict[str, tuple[str, Handler]] = {
            "/checkpoint": ("POST", checkpoint),
            "/status": ("GET", status),
            "/env": ("GET", env),
        }
        self._limits = limits
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def open(self, listener: socket.socket) -> None:
        """Serve on ``listener``, which it now owns."""
        # asyncio calls listen(2) again, with its own backlog of 100 unless it is told otherwise.
        self._server = await asyncio.start_server(
            self._accepted, sock=listener, backlog=self._limits.connections
        )

    async def close(self) -> None:
        """Stop listening and drop every connection, answered or not."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio 3.11 reports the cancellation of the one it would make as an error.
        if len(self._connections) >= 2 * self._limits.connections:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        crowded = len(self._connections) > self._limits.connections
        try:
            await _Connection(self, reader, writer, crowded=crowded).serve()
            writer.close()
            async with asyncio.timeout(self._limits.read_s):
                await writer.wait_closed()
        except (OSError, h11.LocalProtocolError):
            pass  # the caller is gone or takes no answer; what it asked for goes on
        finally:
            writer.transport.abort()  # a no-op after a proper close

    async def answer(self, method: str, path: str) -> Answer:
        """The answer to one well-formed request."""
        if path not in self._routes:
            return _error(404, "not_found", f"no {path} here; there are " + ", ".join(self._routes))
        wanted, handler = self._routes[path]
        if method != wanted:
            refusal = _error(405, "method_not_allowed", f"{path} takes {wanted}, not {method}")
            return dataclasses.replace(refusal, headers=(("allow", wanted),))
        try:
            return await handler()
        except Exception as error:
            return _error(500, "internal", f"{type(error).__name__} while answering {path}")

    @property
    def limits(self) -> Limits:
        return self._limits


class _Connection:
    """One client connection: reads requests through h11, writes answers."""

    def __init__(
        self, sidecar: Sidecar, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, crowded: bool
    ) -> None:
        self._sidecar = sidecar
        self._limits = sidecar.limits
        self._reader = reader
        self._writer = writer
        self._crowded = crowded
        self._head = False
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes)

    async def serve(self) -> None:
        while True:
            try:
                request = await self._request()
                if request is None:
                    return
                method, path = request
                answer = await self._sidecar.answer(method, path)
            except _Refused as refusal:
                await self._send(refusal.answer, close=True)
                await self._linger()
                return
            await self._send(answer, close=False)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _request(self) -> tuple[str, str] | None:
        """Method and path of the next request, its body read and dropped; None at the end of the connection."""
        if self._crowded:
            raise _Refused(503, "too_many_connections", f"more than {self._limits.connections} connections")
        if not await self._begun():
            return None
        deadline = asyncio.get_running_loop().time() + self._limits.read_s
        event = await self._event(deadline)
        if not isinstance(event, h11.Request):
            return None
        for name, value in event.headers:
            if name == b"content-length" and int(value) > self._limits.body_bytes:
                raise self._too_large()
        self._head = event.method == b"HEAD"
        await self._drop_body(deadline)
        return event.method.decode("ascii", "replace"), _path(event.target)

    async def _begun(self) -> bool:
        """Wait for the first byte of a request; False when there won't be one."""
        if self._http.trailing_data[0]:
            return True  # it came behind the request before it
        try:
            async with asyncio.timeout(self._limits.idle_s):
                data = await self._reader.read(_PIECE)
        except TimeoutError:
            return False
        self._http.receive_data(data)
        return bool(data)

    async def _drop_body(self, deadline: float) -> None:
        size = 0
        while True:
            event = await self._event(deadline)
            if isinstance(event, h11.Data):
                size += len(event.data)
                if size > self._limits.body_bytes:
                    raise self._too_large()
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise ConnectionResetError

    async def _event(self, deadline: float) -> Any:
        """The next h11 event; ``deadline`` is in the loop's time."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                status = error.error_status_hint
                code = "header_too_large" if status == 431 else "bad_request"
                raise _Refused(status, code, str(error)) from None
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                self._write(h11.InformationalResponse(status_code=100, headers=[]))
            try:
                async with asyncio.timeout_at(deadline):
                    data = await self._reader.read(_PIECE)
            except TimeoutError:
                raise _Refused(408, "timeout", "the request did not arrive in time") from None
            self._http.receive_data(data)

    def _too_large(self) -> _Refused:
        return _Refused(413, "body_too_large", f"the body may have {self._limits.body_bytes} bytes at most")

    async def _send(self, answer: Answer, *, close: bool) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return  # h11 gave the connection up: nothing well-formed can be said any more
        body = json.dumps(answer.body).encode() + b"\n"
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), *answer.headers]
        if close:
            headers.append(("connection", "close"))
        reason = http.HTTPStatus(answer.status).phrase
        self._write(h11.Response(status_code=answer.status, headers=headers, reason=reason))
        if not self._head:
            self._write(h11.Data(data=body))
        self._write(h11.EndOfMessage())
        async with asyncio.timeout(
            self._limits.read_s
        ):  # a caller that takes no answer holds nothing of ours
            await self._writer.drain()

    def _write(self, event: h11.Event) -> None:
        self._writer.write(self._http.send(event) or b"")

    async def _linger(self) -> None:
        """Let a client that is still sending read the refusal: a close with unread data would reset it."""
        if self._writer.can_write_eof():
            self._writer.write_eof()
        try:
            async with asyncio.timeout(2.0):
                while await self._reader.read(_PIECE):
                    pass
        except TimeoutError:
            pass


def _path(target: bytes) -> str:
    """The path of a request target, in the absolute form too (RFC 9112, 3.2.2); its query is nobody's."""
    path = target.split(b"?", 1)[0].decode("ascii", "replace")
    if path.startswith("http://"):
        path = "/" + path.removeprefix("http://").partition("/")[2]
    return path


def _error(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": {"code": code, "message": message}})
