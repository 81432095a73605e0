"""The process that keepers and their pagers are forked from, and the node's hold on it.

A Python interpreter that imports what a keeper needs takes 0.4 s of a processor, one for its pager 0.3 s. A node that
starts both anew for every instance is slow exactly when many are wanted at once. So one process imports all of it
once, starts no thread, and forks: a keeper with its pager comes up in a few milliseconds, and shares the memory of
everything imported.

Guarantees: keepers don't depend on it (whoever adopts orphans adopts them, and its death changes nothing for them);
it ends with the node. A node whose zygote has died starts another with the next keeper.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from relume.engine.jobs import Container
from relume.errors import HostError
from relume.linux import process

_PACKET = 1 << 16
_TITLE = 100
"""Bytes on the command line of which a child makes its own (setproctitle(3bsd) can only overwrite)."""

_PATIENCE = 30.0
"""Seconds for a keeper to be forked; the first waits for all the imports."""


class Zygote:
    """The node's hold: started with the first keeper, and again when it is gone."""

    def __init__(self, *, store: bool = False) -> None:
        """``store``: pagers may be asked for pages of a region's store, so what that needs is imported too."""
        self._store = store
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._one_at_a_time = asyncio.Lock()

    async def spawn(self, container: Container) -> int:
        """Start the keeper of ``container`` in a session of its own; its pid, before it listens. Raises HostError."""
        request = json.dumps(dataclasses.asdict(container)).encode()
        async with self._one_at_a_time:
            for attempt in range(2):
                try:
                    async with asyncio.timeout(_PATIENCE):
                        return await self._ask(request)
                except (OSError, TimeoutError) as error:  # EPIPE, ECONNRESET: it died since the last one
                    await self._drop()
                    if attempt:
                        raise HostError(
                            f"no keeper can be started: {error or 'its process does not answer'}",
                            hint="the node's log has its last words; is the machine out of memory or processes?",
                        ) from error
        raise AssertionError

    async def _ask(self, request: bytes) -> int:
        loop = asyncio.get_running_loop()
        if self._control is None:
            self._control = await self._start()
        await loop.sock_sendall(self._control, request)
        answer = await loop.sock_recv(self._control, _PACKET)
        if not answer:
            raise ConnectionResetError("the process that keepers are forked from has ended")
        told = json.loads(answer)
        if "error" in told:
            raise HostError(
                f"no keeper can be started: {told['error']}", hint="relume doctor tests the machine"
            )
        return int(told["pid"])

    async def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "relume.keeper", str(theirs.fileno())),
                *(["--store"] if self._store else []),
                "-" * _TITLE,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the node's
                env={**os.environ, "SPT_NOENV": "1"},  # a title of its own must not cost it its environment
            )
        ours.setblocking(False)
        return ours

    async def _drop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def close(self) -> None:
        """End it; the keepers stay."""
        async with self._one_at_a_time:
            await self._drop()


def serve(control: socket.socket, become_keeper: Callable[[Container], NoReturn]) -> None:
    """Fork a keeper for each packet that comes; returns when the node is gone. For a process without threads."""
    process.set_name("relume-zygote")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a keeper ended: its exit file says it
    gc.freeze()  # a collection in a child must not copy every page that it only looks at
    while packet := _packet(control):
        try:
            pid = os.fork()
            answer: dict[str, object] = {"pid": pid}
        except OSError as error:
            pid, answer = -1, {"error": str(error)}
        if pid == 0:
            control.close()
            _child(Container(**json.loads(packet)), become_keeper)
        try:
            control.send(json.dumps(answer).encode())
        except (BrokenPipeError, ConnectionResetError):
            return  # the node was killed while it asked


def _packet(control: socket.socket) -> bytes:
    """The next request; nothing when the node is gone."""
    try:
        return control.recv(_PACKET)
    except ConnectionResetError:
        return b""  # it was killed with an answer of ours unread


def _child(container: Container, become_keeper: Callable[[Container], NoReturn]) -> NoReturn:
    """A session, a log and a name of its own, then the keeper."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        log = os.open(Path(container.runtime) / "keeper.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        become_keeper(container)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)
