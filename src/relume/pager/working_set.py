"""The pages an app needs up to its first answer: learned by one restore, replayed by the next.

A working set is a list of pieces of pages files, in the order of first touch; a byte appears once, so it is
never larger than the image. Pieces name offsets in the pages file, not addresses: these hold whatever the
app moved. The file is one line of JSON, the pieces in binary, and a BLAKE3 of both. Whatever is wrong with
it costs time only: :func:`load` answers None with the reason, and the restore learns anew.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from relume.pager.ranges import Range, RangeMap

BLOCK_BYTES = 2 << 20
"""What is replayed in one copy at most: pieces are put together within such blocks of the file."""

_VERSION = 1
_PIECE = struct.Struct("<IQI")
_HISTORY = 16
_DIGEST_BYTES = 32

WITHHELD_SHARE = 32
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
        """Whether replaying has been no slower than starting without, judged by the medians.

        True until both kinds were measured: the first restore of a checkpoint is one without, and when
        replays lose, every 16th start is made with one again, by the history that is forgotten.
        """
        without = [run.seconds for run in self.history if not run.replayed]
        replayed = [run.seconds for run in self.history if run.replayed]
        if not without or len(replayed) < 3:
            return True
        return statistics.median(replayed) <= 1.05 * statistics.median(without)

    def after(self, run: Run) -> WorkingSet:
        """The same with one more measurement; the oldest of its kind goes when there are many."""
        history = [*self.history, run]
        same = [index for index, each in enumerate(history) if each.replayed == run.replayed]
        if len(same) > _HISTORY // 2:
            del history[same[0]]
        elif not run.replayed and not self.worthwhile and len(self.history) >= _HISTORY // 2:
            history = [each for each in history if not each.replayed]
        return replace(self, history=tuple(history), turn=self.turn + 1)


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
    return range(turn % WITHHELD_SHARE, blocks, WITHHELD_SHARE) if blocks > WITHHELD_SHARE else range(0)


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
        position, end = piece.offset, piece.offset + piece.length
        while position < end:
            taken = known.after(position)
            stop = min(end, taken.start) if taken else end
            if position < stop:
                result.append(Piece(piece.pages_id, position, stop - position))
                known.put(Range(position, stop, position))
            position = max(stop, min(end, taken.end)) if taken else end
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
    """The working set in ``path`` if it is whole and was learned from ``images``; else None and why not."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, "nothing learned yet"
    except OSError as error:
        return None, f"{path}: {error.strerror}"
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if blake3(body).digest() != digest:
        return None, f"{path}: is damaged"
    line, _, packed = body.partition(b"\n")
    header = json.loads(line)
    if header["version"] != _VERSION:
        return None, f"{path}: version {header['version']} is not known here"
    learned_from = {int(pages_id): size for pages_id, size in header["images"].items()}
    if learned_from != images:
        return None, f"{path}: was learned from other images"
    pieces = tuple(Piece(*fields) for fields in _PIECE.iter_unpack(packed))
    if any(piece.offset + piece.length > images.get(piece.pages_id, 0) for piece in pieces):
        return None, f"{path}: names pages that the images do not have"
    history = tuple(Run(bool(replayed), seconds, missed) for replayed, seconds, missed in header["history"])
    return WorkingSet(images, pieces, header["turn"], history), ""
