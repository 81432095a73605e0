"""The stdio of a container: stdin empty, stdout and stderr anonymous pipes that are read here.

They must be anonymous pipes: CRIU leaves an inherited pipe to runc, which plugs the new one in at restore; a
FIFO with a name or a file outside makes the dump fail (``Can't lookup mount``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

Sink = Callable[[bytes, str], None]

_PIECE = 64 * 1024


class Stdio:
    """Two pipes; what arrives goes to ``sink(data, stream)`` with stream "out" or "err"."""

    def __init__(self, sink: Sink, *, owner: int) -> None:
        """``owner`` is the host id of the container's root: /dev/stdout and /dev/stderr are opened by name."""
        self._sink = sink
        self._owner = owner
        self._open: set[int] = set()
        self._ended = asyncio.Event()
        self.out = self._pipe("out")
        self.err = self._pipe("err")

    def _pipe(self, stream: str) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        os.fchown(writer, self._owner, self._owner)
        self._open.add(reader)
        asyncio.get_running_loop().add_reader(reader, self._read, reader, stream)
        return writer

    def _read(self, reader: int, stream: str) -> None:
        try:
            data = os.read(reader, _PIECE)
        except BlockingIOError:
            return
        if data:
            self._sink(data, stream)
            return
        asyncio.get_running_loop().remove_reader(reader)
        os.close(reader)
        self._open.discard(reader)
        if not self._open:
            self._ended.set()

    def hand_over(self) -> None:
        """Close our write ends, once the container has its copies."""
        for writer in (self.out, self.err):
            os.close(writer)

    async def drained(self, timeout: float) -> None:
        """Wait until both pipes ended, or ``timeout`` seconds (an escaped process may hold one)."""
        try:
            async with asyncio.timeout(timeout):
                await self._ended.wait()
        except TimeoutError:
            for reader in list(self._open):
                self._read_rest(reader)

    def _read_rest(self, reader: int) -> None:
        asyncio.get_running_loop().remove_reader(reader)
        os.close(reader)
        self._open.discard(reader)
