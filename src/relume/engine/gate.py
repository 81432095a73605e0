"""A meeting point between this process and a hook that runc or CRIU runs: two FIFOs and three lines of sh.

A hook written in Python would pay the interpreter's start on every boot and restore; one written in sh pays
2 ms, says what it was told, and waits for the keeper to do the work with the system calls at hand.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from pathlib import Path


class Gate:
    """``NAME.in`` and ``NAME.out`` in ``directory``. The hook writes to the first and waits on the second."""

    def __init__(self, directory: Path, name: str) -> None:
        self._in = directory / f"{name}.in"
        self._out = directory / f"{name}.out"
        self.script = directory / name
        for fifo in (self._in, self._out):
            if not fifo.exists():
                os.mkfifo(fifo, 0o600)
        # Opened for both directions, a FIFO neither blocks at open nor ends when the hook closes it.
        self._reader = os.open(self._in, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._writer = os.open(self._out, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def write_hook(self) -> None:
        """A createRuntime hook: hands over the OCI state, one JSON object in one line, from its stdin."""
        # By the shell's own means: a cat would be one more process in the path of every start.
        self._install(f"IFS= read -r state\nprintf '%s\\n' \"$state\" >{self._quoted_in}\n")

    def write_action_script(self, action: str) -> None:
        """A CRIU action script that meets us at ``action`` only; for the others it ends at once."""
        self._install(
            f'[ "$CRTOOLS_SCRIPT_ACTION" = {action} ] || exit 0\necho {action} >{self._quoted_in}\n'
        )

    @property
    def _quoted_in(self) -> str:
        return shlex.quote(str(self._in))

    def _install(self, tell: str) -> None:
        wait = f'read -r answer <{shlex.quote(str(self._out))}\n[ "$answer" = ok ]\n'
        self.script.write_text(f"#!/bin/sh\n{tell}{wait}")
        self.script.chmod(0o700)

    async def arrival(self) -> bytes:
        """Wait for the hook; returns what it said, without the last newline."""
        loop = asyncio.get_running_loop()
        said = b""
        while not said.endswith(b"\n"):
            readable = asyncio.Event()
            loop.add_reader(self._reader, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(self._reader)
            try:
                said += os.read(self._reader, 65536)
            except BlockingIOError:
                continue
        return said.strip()

    def release(self, *, ok: bool = True) -> None:
        """Let the hook end, with success or failure."""
        os.write(self._writer, b"ok\n" if ok else b"no\n")

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
