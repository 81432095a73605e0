"""Reading an instance's log while it grows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

_PIECE = 256 * 1024
_PAUSE = 0.1


async def follow(path: Path, *, ended: asyncio.Event | None) -> AsyncIterator[bytes]:
    """The raw bytes of the log at ``path``, the rotated generation first; with ``ended``, until that is set.

    A rotation in between loses nothing: the renamed file is read to its end before the new one is opened.
    """
    rotated = path.with_name(path.name + ".1")
    if rotated.exists():
        for piece in _pieces(rotated):
            yield piece
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return
        with file:
            while True:
                last_look = ended is None or ended.is_set()
                while piece := file.read(_PIECE):
                    yield piece
                if last_look:
                    return
                if _replaced(path, file.fileno()):
                    break
                await asyncio.sleep(_PAUSE)


def _pieces(path: Path) -> list[bytes]:
    with path.open("rb") as file:
        return list(iter(lambda: file.read(_PIECE), b""))


def _replaced(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino != os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
