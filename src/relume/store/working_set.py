"""The working set in the store: the pages up to the first answer, in touch order, in a few large objects.

A node that has learned a checkpoint's working set publishes it, so that a node that has never seen the
checkpoint reads those pages in sequence instead of picking thousands of chunks apart. It is signed and
encrypted like the rest. A *list* that is wrong (stale, partial, of another run) costs time only: what it leaves
out is read from chunks on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from blake3 import blake3
from pydantic import Field

from relume.errors import ObjectMissing, StoreError, Untrusted
from relume.store import faults
from relume.store.chunks import PAGE
from relume.store.envelope import (
    Kind,
    new_data_key,
    seal,
    seal_signed,
    stored_limit,
    unseal_into,
    unseal_signed,
)
from relume.store.index import Stream
from relume.store.keys import Keyring
from relume.store.manifest import Count, Digest, ObjectRef, Record, Text, parse
from relume.store.names import CheckpointName
from relume.store.objects import Objects

PART_PAGES = 2048  # 8 MiB of pages: large enough for a busy link, small enough to be asked for out of turn
_ATTEMPTS = 16


@dataclass(frozen=True, slots=True)
class PageRun:
    """`pages` pages of a stream, from page `first` on."""

    stream: str
    first: int
    pages: int


class Part(Record):
    """One object: the pages of `runs` (stream ordinal, first page, pages), one after the other.

    `pages_blake3` is of the plain pages, so that they are recognised on a disk, where nobody has to be believed.
    """

    ref: ObjectRef
    pages_blake3: Digest
    runs: tuple[tuple[Count, Count, Count], ...] = Field(strict=False)

    @property
    def pages(self) -> int:
        return sum(pages for _, _, pages in self.runs)


class WorkingSetList(Record):
    format: Literal[1] = 1
    app: Text
    build: Text
    platform: Text
    generation: Annotated[int, Field(ge=1)]
    number: Annotated[int, Field(ge=1)]
    streams: tuple[Text, ...] = Field(strict=False)
    parts: tuple[Part, ...] = Field(strict=False)


class WorkingSet:
    """A published working set, opened: its parts in order, ready to be fetched."""

    def __init__(
        self, objects: Objects, name: CheckpointName, listing: WorkingSetList, data_key: bytes
    ) -> None:
        self.number = listing.number
        self.parts = listing.parts
        self._streams = listing.streams
        self._objects = objects
        self._prefix = f"{name.working_sets}/{listing.number}"
        self._data_key = data_key

    @property
    def stored_bytes(self) -> int:
        return sum(part.ref.size for part in self.parts)

    def __iter__(self) -> Iterator[PageRun]:
        """Every run, in touch order."""
        for part in range(len(self.parts)):
            yield from self.runs(part)

    def runs(self, part: int) -> Iterator[PageRun]:
        for stream, first, pages in self.parts[part].runs:
            yield PageRun(self._streams[stream], first, pages)

    def fetch(self, part: int) -> bytes | memoryview:
        """The pages of part `part`. Raises Untrusted, ObjectMissing, StoreError.

        What authenticates them is AES-GCM, under the data key that the signed list wraps and with the part's name: a
        hash of the same bytes as well would be a fifth of what a first answer costs in processor time.
        """
        name = f"{self._prefix}/{part}"
        data = self._objects.get(name, limit=stored_limit(Kind.WORKING_SET_PART))
        plain = unseal_into(bytearray(), self._data_key, Kind.WORKING_SET_PART, name, data)
        if len(plain) != self.parts[part].pages * PAGE:
            raise Untrusted(f"{name} holds other pages than its list says")
        return plain


def publish_working_set(
    objects: Objects,
    keyring: Keyring,
    app: str,
    name: CheckpointName,
    runs: Iterable[PageRun],
    read: Callable[[PageRun], bytes],
    *,
    parallel: int = 4,
) -> int:
    """Publish `runs` (touch order, no page twice) and return the number it got. `read` gives the pages of a run.

    Raises StoreError. Until its list is there a working set does not exist, so dying halfway leaves only
    parts that gc removes.
    """
    pieces = list(_parts(runs))
    streams = tuple(dict.fromkeys(run.stream for piece in pieces for run in piece))
    for number in _free_numbers(objects, name):
        data_key = new_data_key()
        prefix = f"{name.working_sets}/{number}"

        def send(numbered: tuple[int, list[PageRun]], prefix: str = prefix, key: bytes = data_key) -> Part:
            ordinal, piece = numbered
            part_name = f"{prefix}/{ordinal}"
            pages = b"".join(map(read, piece))
            sealed = seal(key, Kind.WORKING_SET_PART, part_name, pages)
            if not objects.create(part_name, sealed):
                raise _Taken
            faults.point("working_set.part")
            placed = tuple((streams.index(run.stream), run.first, run.pages) for run in piece)
            return Part(ref=ObjectRef.of(sealed), pages_blake3=blake3(pages).hexdigest(), runs=placed)

        try:
            with ThreadPoolExecutor(parallel, thread_name_prefix="working-set") as pool:
                parts = tuple(pool.map(send, enumerate(pieces)))
        except _Taken:
            continue  # another node publishes under this number, or died doing so
        listing = WorkingSetList(
            app=app,
            build=name.build,
            platform=name.platform,
            generation=name.generation,
            number=number,
            streams=streams,
            parts=parts,
        )
        sealed = seal_signed(
            keyring, Kind.WORKING_SET_LIST, f"{prefix}/list", listing.model_dump_json().encode(), data_key
        )
        if objects.create(f"{prefix}/list", sealed):
            faults.point("working_set.list")
            return number
    raise StoreError(
        f"no free number for a working set of {name.id}", hint="Other nodes publish theirs; that is enough."
    )


def find_working_set(objects: Objects, name: CheckpointName) -> tuple[int, bytes] | None:
    """The newest working set whose list is there: its number and the sealed list. Raises StoreError."""
    numbers = [number for number, last in _listed(objects, name) if last == "list"]
    if not numbers:
        return None
    where = f"{name.working_sets}/{max(numbers)}/list"
    try:
        return max(numbers), bytes(objects.get(where, limit=stored_limit(Kind.WORKING_SET_LIST)))
    except ObjectMissing:
        return None  # collected between the two requests


def open_working_set(
    objects: Objects,
    keyring: Keyring,
    name: CheckpointName,
    number: int,
    sealed: bytes,
    streams: tuple[Stream, ...],
) -> WorkingSet:
    """Raises Untrusted unless `sealed` is the signed list `number` of this checkpoint, and names only pages it has."""
    where = f"{name.working_sets}/{number}/list"
    opened = unseal_signed(keyring, Kind.WORKING_SET_LIST, where, sealed)
    listing = parse(opened.body, WorkingSetList, where)
    said = (listing.build, listing.platform, listing.generation, listing.number)
    if said != (name.build, name.platform, name.generation, number):
        raise Untrusted(f"{where} is the working set of another checkpoint")
    pages = {stream.name: stream.pages for stream in streams}
    for part in listing.parts:
        if not 0 < part.pages <= PART_PAGES:
            raise Untrusted(f"{where} has a part of {part.pages} pages")
        for stream, first, count in part.runs:
            if stream >= len(listing.streams) or first + count > pages.get(listing.streams[stream], 0):
                raise Untrusted(f"{where} names pages that the checkpoint does not have")
    return WorkingSet(objects, name, listing, opened.data_key)


class _Taken(Exception):
    pass


def _parts(runs: Iterable[PageRun]) -> Iterator[list[PageRun]]:
    piece: list[PageRun] = []
    room = PART_PAGES
    for run in runs:
        first, left = run.first, run.pages
        while left:
            take = min(left, room)
            piece.append(PageRun(run.stream, first, take))
            first, left, room = first + take, left - take, room - take
            if not room:
                yield piece
                piece, room = [], PART_PAGES
    if piece:
        yield piece


def _listed(objects: Objects, name: CheckpointName) -> Iterator[tuple[int, str]]:
    for info in objects.list(name.working_sets):
        number, _, last = info.name.removeprefix(f"{name.working_sets}/").partition("/")
        if number.isdecimal():
            yield int(number), last


def _free_numbers(objects: Objects, name: CheckpointName) -> Iterator[int]:
    newest = max((number for number, _ in _listed(objects, name)), default=0)
    yield from range(newest + 1, newest + 1 + _ATTEMPTS)


def read_from_files(directory: Path) -> Callable[[PageRun], bytes]:
    """Reads runs from page images in `directory`, which must be whole: what is missing would be read as zeros."""

    def read(run: PageRun) -> bytes:
        with (directory / run.stream).open("rb", buffering=0) as file:
            file.seek(run.first * PAGE)
            data = file.read(run.pages * PAGE)
        return data + bytes(run.pages * PAGE - len(data))

    return read
