"""CRIU's own ``lazy-pages`` daemon in the place of our pager: what ours is compared with (`relume bench`).

It serves the same socket in the same folder, so CRIU's restore sees no difference. It learns nothing, verifies
nothing, and where it dies nobody holds the memory: the instance is killed, as soon as that is seen.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relume.engine.paging import OnEvent
from relume.errors import PagerError

DAEMON = "criu"
"""What a pager job's ``daemon`` says to ask for this one."""

_PATIENCE = 10.0


class LazyPages:
    """One daemon; to the engine the same as a relume.engine.paging.PagerProcess, without events."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._watching = asyncio.create_task(self._watch())
        self.on_event: OnEvent = lambda event: None
        self.on_death: Callable[[], None] = lambda: None

    @classmethod
    async def spawn(cls, criu: Path, job: dict[str, Any]) -> LazyPages:
        """Start it; returns when it listens. Raises PagerError."""
        ready, theirs = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(criu, "lazy-pages", "--images-dir", job["images"], "--work-dir", job["work_dir"]),
                *("--status-fd", str(theirs), "--log-file", "lazy-pages.log", "-v2"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs,),
            )
        finally:
            os.close(theirs)
        try:
            listens = await asyncio.wait_for(asyncio.to_thread(os.read, ready, 1), _PATIENCE)
        finally:
            os.close(ready)
        if not listens:
            await process.wait()
            log = Path(job["work_dir"]) / "lazy-pages.log"
            raise PagerError(
                f"criu lazy-pages ended with status {process.returncode}", hint=f"its words are in {log}"
            )
        return cls(process)

    async def listen(self, job: dict[str, Any]) -> None:
        """It listens from the start."""

    def first_answer(self) -> None:
        """It does not care."""

    async def _watch(self) -> None:
        if await self._process.wait() != 0:
            self.on_death()

    async def close(self) -> None:
        """End it. Nothing happens to one that is done."""
        self._watching.cancel()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
