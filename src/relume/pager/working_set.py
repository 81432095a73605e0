"""The pages an app needs up to its first answer: learned by one restore, replayed by the next.

A working set is a list of pieces of pages files, in the order of first touch; a byte appears once, so it is
never larger than the image. Pieces name offsets in the pages file, not addresses: these hold whatever the
app moved. The file is one line of JSON, the pieces in binary, and a BLAKE3 of both. Whatever is wrong with
it costs time only: :func:`load` answers None with the reason, and the restore learns anew.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import statistics
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from relume.images.pagemap import PAGE_SIZE
from relume.pager.ranges import Range, RangeMap

BLOCK_BYTES = 2 << 20
"""What is replayed in one copy at most: pieces are put together within such blocks of the file."""

_VERSION = 1
_PIECE = struct.Struct("<IQI")
_HISTORY = 16
_ENOUGH = 3
_CAN_LOSE_BYTES = 64 << 20
"""A smaller one takes some 10 ms to replay: not worth a slower start to measure it."""

_COMPARED_EVERY = 64
"""Every so many starts one is made without, also where replays win: apps change."""

_HEADER_BYTES = 1 << 16
_TURNS = 1 << 30
_DIGEST_BYTES = 32

WITHHELD_SHARE = 64
"""One in so many blocks is withheld from a replay, in turn: only an untouched page tells that it is not needed."""


class Piece(NamedTuple):
    """``length`` bytes at ``offset`` in ``pages-{pages_id}.img``."""

    pages_id: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Run:
    """What one restore measured: ``seconds`` from CRIU's end to the first answer, ``missed`` bytes by fault."""

    replayed: bool
    seconds: float
    missed: int


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """``images`` (pages_id -> bytes) are those it was learned from; ``turn`` says which blocks come to be withheld."""

    images: dict[int, int]
    pieces: tuple[Piece, ...]
    turn: int = 0
    history: tuple[Run, ...] = field(default=())

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(piece.length for piece in self.pieces)

    @property
    def worthwhile(self) -> bool:
        """Whether the next start replays it: unless that was slower, or is to be compared with one that does not.

        Judged by the medians. When replays lose, they are tried again after eight starts without: what was measured
        before the last of these is forgotten then.
        """
        without, replayed = self._seconds(False), self._seconds(True)
        if self.total >= _CAN_LOSE_BYTES and (
            (not without and len(replayed) >= _ENOUGH) or self.turn % _COMPARED_EVERY == _COMPARED_EVERY - 1
        ):
            return False
        if not without or len(replayed) < _ENOUGH:
            return True
        return statistics.median(replayed) <= 1.05 * statistics.median(without)

    def after(self, run: Run | None) -> WorkingSet:
        """The same with one more measurement; the oldest of its kind goes when there are many.

        None is a start that measured nothing of use: it had to hash the image too.
        """
        history = self.history
        if run is not None:
            same = [each for each in history if each.replayed == run.replayed][-(_HISTORY // 2) + 1 :]
            history = (*(each for each in history if each.replayed != run.replayed or each in same), run)
            losing = not run.replayed and not self.worthwhile
            if losing and len(same) == _HISTORY // 2 - 1:
                history = (run,)
        return replace(self, history=history, turn=self.turn + 1)

    def _seconds(self, replayed: bool) -> list[float]:
        return [run.seconds for run in self.history if run.replayed == replayed]


def plan(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces by block of 2 MiB, blocks in order of first touch, neighbours within a block made one."""
    blocks: dict[tuple[int, int], RangeMap] = {}
    for pages_id, offset, length in pieces:
        end = offset + length
        while offset < end:
            block = offset // BLOCK_BYTES
            stop = min(end, (block + 1) * BLOCK_BYTES)
            known = blocks.setdefault((pages_id, block), RangeMap())
            known.take(offset, stop)
            known.put(Range(offset, stop, offset))
            offset = stop
    return [
        [Piece(pages_id, each.start, each.length) for each in ranges]
        for (pages_id, _), ranges in blocks.items()
    ]


def withheld(blocks: int, turn: int) -> range:
    """The numbers of the blocks that a replay leaves out on this turn."""
    return range(turn % WITHHELD_SHARE, blocks, WITHHELD_SHARE) if blocks > 1 else range(0)


def refine(
    replayed: Iterable[Piece], kept_back: Iterable[Piece], touched: Iterable[Piece]
) -> tuple[Piece, ...]:
    """What to replay next time: what was replayed, of what was kept back only what was touched, what was missed.

    ``touched`` is what came in by faults, in order. Each byte appears once, at its first place.
    """
    back = _union(kept_back)
    asked = list(touched)
    seen: dict[int, RangeMap] = {}
    result: list[Piece] = []
    needed = _union(asked)
    for piece in [*_ordered_keep(replayed, back, needed), *asked]:
        known = seen.setdefault(piece.pages_id, RangeMap())
        for start, stop in known.gaps(piece.offset, piece.offset + piece.length):
            result.append(Piece(piece.pages_id, start, stop - start))
            known.put(Range(start, stop, start))
    return tuple(result)


def _ordered_keep(
    pieces: Iterable[Piece], back: dict[int, RangeMap], needed: dict[int, RangeMap]
) -> Iterator[Piece]:
    """``pieces``, those kept back reduced to what was needed of them, in the same order."""
    for piece in pieces:
        end = piece.offset + piece.length
        held = back.get(piece.pages_id)
        if held is None or not held.overlap(piece.offset, end):
            yield piece
        elif piece.pages_id in needed:
            for each in needed[piece.pages_id].overlap(piece.offset, end):
                yield Piece(piece.pages_id, each.start, each.length)


def _union(pieces: Iterable[Piece]) -> dict[int, RangeMap]:
    found: dict[int, RangeMap] = {}
    for pages_id, offset, length in pieces:
        known = found.setdefault(pages_id, RangeMap())
        known.take(offset, offset + length)
        known.put(Range(offset, offset + length, offset))
    return found


def save(path: Path, working_set: WorkingSet) -> None:
    """Writes the file (new file, rename; not synced: losing it costs time only). Raises OSError."""
    header = {
        "version": _VERSION,
        "images": {str(pages_id): size for pages_id, size in working_set.images.items()},
        "pieces": len(working_set.pieces),
        "bytes": working_set.total,
        "turn": working_set.turn,
        "history": [[run.replayed, round(run.seconds, 6), run.missed] for run in working_set.history],
    }
    body = json.dumps(header).encode() + b"\n" + b"".join(_PIECE.pack(*piece) for piece in working_set.pieces)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(body + blake3(body).digest())
    temporary.rename(path)


def load(path: Path, images: dict[int, int]) -> tuple[WorkingSet | None, str]:
    """The working set in ``path`` if it is whole and was learned from ``images``; else None and why not.

    Never raises, never waits, and reads no more than such a file may have: whoever wrote it, it costs time only.
    """
    try:
        data = _content(path, _HEADER_BYTES + sum(images.values()) // PAGE_SIZE * _PIECE.size + _DIGEST_BYTES)
    except FileNotFoundError:
        return None, "nothing learned yet"
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if blake3(body).digest() != digest:
        return None, f"{path}: is damaged"
    line, _, packed = body.partition(b"\n")
    try:
        header = json.loads(line)
        if header["version"] != _VERSION:
            return None, f"{path}: version {header['version']!r} is not known here"
        if {int(pages_id): size for pages_id, size in header["images"].items()} != images:
            return None, f"{path}: was learned from other images"
        pieces = tuple(Piece(*fields) for fields in _PIECE.iter_unpack(packed))
        history = tuple(
            Run(bool(replayed), float(seconds), int(missed))
            for replayed, seconds, missed in header["history"]
        )
        learned = WorkingSet(images, pieces, int(header["turn"]) % _TURNS, history)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, struct.error):
        return None, f"{path}: is no working set"
    if why := _impossible(learned):
        return None, f"{path}: {why}"
    return learned, ""


def _impossible(learned: WorkingSet) -> str:
    """What in it cannot have been learned: nothing of such a file is used."""
    for pages_id, offset, length in learned.pieces:
        if offset % PAGE_SIZE or length % PAGE_SIZE or not length:
            return "names parts of pages"
        if offset + length > learned.images.get(pages_id, 0):
            return "names pages that the images do not have"
    if learned.total > sum(learned.images.values()):
        return "names pages twice"
    if not all(math.isfinite(run.seconds) for run in learned.history):
        return "has times that are none"
    return ""


def _content(path: Path, limit: int) -> bytes:
    """All of a file of ``limit`` bytes at most. Raises OSError, also where it is longer or no file at all."""
    # Without waiting: opening a FIFO would.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a file")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"is too large ({status.st_size} bytes)")
        return file.read(limit)
