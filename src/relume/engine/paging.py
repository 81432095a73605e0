"""The pager of one restored container, seen from its keeper: forked ahead of need, given its job, heard.

The pager's holder is a child of the keeper. If it ends while the instance needs it, the instance is killed. Until
then the keeper keeps the kernel from giving zero pages: it has a duplicate of every userfaultfd, which the pager
sends as soon as it has one, and takes back when the memory behind it is complete (relume.pager.keepsake).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from relume.errors import PagerError
from relume.linux import process
from relume.pager.keepsake import Kept

_PATIENCE = 10.0
_PATIENCE_WITH_STORE = 60.0
"""Seconds until a pager listens; the second where it fetches from a store before, with a bound of its own."""

_LAST_WORDS = 10.0
"""Seconds for a pager to say why it ends, on a busy machine; one that is well answers at once."""

OnEvent = Callable[[dict[str, Any]], None]


class PagerProcess:
    """One pager. Its events (relume.pager.job) go to ``on_event``."""

    def __init__(self, pid: int, control: socket.socket, keeps: socket.socket) -> None:
        """``pid`` is a child of ours, which waits for its job at the other end of ``control``."""
        self._pid = pid
        self._code: int | None = None
        """How it ended; from then on the pid may be another's."""
        self._kept = Kept(keeps)
        self._control = control
        self._writer: asyncio.StreamWriter | None = None
        self._listening = asyncio.Event()
        self._done = False
        self._armed = False
        self._closing = False
        self._reading: asyncio.Task[None] | None = None
        self.on_event: OnEvent = lambda event: None
        self.on_death: Callable[[], None] = lambda: None

    async def listen(self, job: dict[str, Any]) -> None:
        """Give it its job; returns when CRIU may be started. Raises PagerError."""
        self._armed = True
        asyncio.get_running_loop().add_reader(self._kept.socket, self._keep)
        reader, self._writer = await asyncio.open_connection(sock=self._control)
        self._reading = asyncio.create_task(self._read(reader))
        self._writer.write(json.dumps(job).encode() + b"\n")
        patience = _PATIENCE_WITH_STORE if job.get("remote") else _PATIENCE
        waits = {asyncio.create_task(self._listening.wait()), self._reading}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED, timeout=patience)
        if not self._listening.is_set():
            raise PagerError("the pager did not come up", hint="its words are in the instance's keeper.log")

    def first_answer(self) -> None:
        """The app has answered: what it needed for that is the working set."""
        if self._writer is not None and self._armed and not self._done:
            self._writer.write(b'{"command": "first_answer"}\n')

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await _line(reader):
            event = json.loads(line)
            match event["event"]:
                case "listening":
                    self._listening.set()
                case "filled" | "gone":
                    self._done = True
                case "failed":
                    self._done = True  # the holder has killed the instance before it said so
            self.on_event(event)
        code = await self._ended()
        if self._done or self._closing:
            self._let_go()
            return
        # Ours are the last descriptors. The pager, if it outlived its holder, has killed the instance before.
        self._done = True
        self.on_death()
        self._let_go()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        self.on_event({"event": "failed", "reason": f"the pager's holder {how}", "untrusted": False})

    def _keep(self) -> None:
        if not self._kept.receive():
            asyncio.get_running_loop().remove_reader(self._kept.socket)

    def _let_go(self) -> None:
        """The pager is gone, and so is the instance, or what it lacked: nobody may wait for a page any more."""
        if self._kept.socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._kept.socket)
            self._kept.close()

    async def _ended(self) -> int:
        """Its exit status, or the signal that ended it, negative."""
        if self._code is None:
            await process.ended(self._pid)
        if self._code is None:  # nobody else has waited meanwhile
            _, status = os.waitpid(self._pid, os.WNOHANG)  # noqa: ASYNC222  (it has ended)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    async def close(self) -> None:
        """End it: one that was never needed, or whose instance is gone, perhaps because of it."""
        if self._writer is not None and self._reading is not None and not self._done:
            # The holder kills first and speaks afterwards: its reason must not be lost with the socket.
            self._writer.write(b'{"command": "stop"}\n')
            await asyncio.wait({self._reading}, timeout=_LAST_WORDS)
        self._closing = True
        if self._writer is not None:
            self._writer.close()
        else:
            self._control.close()
        try:
            async with asyncio.timeout(2):
                await self._ended()
        except TimeoutError:
            process.send(self._pid, signal.SIGKILL)
            await self._ended()
        if self._reading is not None:
            self._reading.cancel()
        self._let_go()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ConnectionError:
        return b""  # it ended with a command of ours unread
