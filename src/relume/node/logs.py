"""Reading an instance's log while it grows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

_PIECE = 256 * 1024
_PAUSE = 0.1


async def follow(path: Path, *, ended: asyncio.Event | None) -> AsyncIterator[bytes]:
    """The raw bytes of the log at ``path``, the rotated generation first; with ``ended``, until that is set.

    A rotation in between loses nothing, since a file is read to its end after it was replaced. Two within a
    tenth of a second may: one generation is kept.
    """
    finished: int | None = None
    while (file := _next(path, finished)) is not None:
        with file:
            while True:
                # Both questions come before the read: what was written before the answers is read for sure.
                replaced = _replaced(path, file.fileno())
                last_look = ended is None or ended.is_set()
                while piece := file.read(_PIECE):
                    yield piece
                if replaced:
                    finished = os.fstat(file.fileno()).st_ino
                    break
                if last_look:
                    return
                await asyncio.sleep(_PAUSE)


def _next(path: Path, finished: int | None) -> BinaryIO | None:
    """What to read after the file with the inode ``finished`` (at first None); None when there is nothing."""
    rotated = path.with_name(path.name + ".1")
    while True:
        before = _inode(rotated)
        try:
            file = (path if before in (None, finished) else rotated).open("rb")
        except FileNotFoundError:
            if _inode(rotated) == before:
                return None
            continue
        if _inode(rotated) == before:
            return file
        file.close()  # rotated in this very moment: what we opened may not be the next


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _replaced(path: Path, descriptor: int) -> bool:
    now = _inode(path)
    return now is not None and now != os.fstat(descriptor).st_ino
