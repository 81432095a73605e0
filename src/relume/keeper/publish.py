"""The published port: 127.0.0.1:PORT on the host, streamed to the instance's port inside its namespace.

While the instance is frozen no new connection is dialled: it would lie in a listener's backlog, where the
dump finds it (and the copy would lose it). The client just waits that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable

_PIECE = 256 * 1024

Dial = Callable[[], Awaitable[socket.socket]]


class PublishedPort:
    """Accepts on loopback from the start, so that the port is known before the app listens."""

    def __init__(self, dial: Dial, on_response: Callable[[], None]) -> None:
        """``dial`` gives a connected socket to the app; ``on_response`` hears of each first byte that leaves."""
        self._dial = dial
        self._on_response = on_response
        self._running = asyncio.Event()
        self._running.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def open(self) -> None:
        """Bind a free port."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0, limit=_PIECE, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    def hold(self) -> None:
        """Dial nobody until :meth:`resume`; what is connected goes on."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    async def close(self) -> None:
        """Stop listening and reset every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio 3.11 reports the cancellation of the one it would make as an error.
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_writer: asyncio.StreamWriter | None = None
        try:
            await self._running.wait()
            inner = await self._dial()
            try:
                inner_reader, inner_writer = await asyncio.open_connection(sock=inner, limit=_PIECE)
            except BaseException:
                inner.close()
                raise
            await asyncio.gather(
                self._stream(reader, inner_writer, None),
                self._stream(inner_reader, writer, self._on_response),
            )
        except BaseException as error:
            # Nobody listens inside, a reset on either side, or the end: both sides hear of it as they would
            # without us. (An orderly end would make half an answer look whole.)
            _reset(writer)
            if inner_writer is not None:
                _reset(inner_writer)
            if not isinstance(error, OSError):
                raise
        else:
            writer.close()
            inner_writer.close()

    async def _stream(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        on_first: Callable[[], None] | None,
    ) -> None:
        while piece := await source.read(_PIECE):
            sink.write(piece)
            if on_first is not None:
                on_first()
                on_first = None
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset: no lingering (socket(7), SO_LINGER) is what makes close(2) send one."""
    with contextlib.suppress(OSError):  # closed already
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
