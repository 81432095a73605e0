"""Chunks: where a stream of pages is cut, what a chunk is called, and how it is stored and read back.

Cuts are made at pages and depend on the pages' content only (content-defined chunking, as borg and restic do
for bytes), so a range of pages that did not change between two builds gives the same chunks wherever it moved.
Address-space randomisation moves everything, which is why cuts by address or offset would never match.
Zero pages are not stored.

A chunk's id is a BLAKE3 of its pages keyed per tenant (an app, or `layers`): equal pages of one tenant are one
object, and nobody without the key can tell whether a known content is in the store. Every chunk that is read is
decrypted with authentication and its id computed again.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from blake3 import blake3

from relume.errors import Untrusted
from relume.store import faults
from relume.store.envelope import Kind, seal, stored_limit, unseal_into
from relume.store.keys import Epoch
from relume.store.objects import Data, Objects

PAGE = 4096
MIN_PAGES = 256
MAX_PAGES = 1024
_MEAN = 256  # a cut every so many pages, past the minimum
_BLOCK = 4 << 20
_ZERO = bytes(PAGE)
_EMPTY_OBJECT = 36  # a sealed object is never this small: what a crash of a directory's host can leave behind


@dataclass(frozen=True)
class Tenant:
    """A name space of chunks with keys of its own under one epoch."""

    epoch: Epoch
    name: str

    @cached_property
    def id(self) -> str:
        return blake3(self.name.encode(), key=self.epoch.derive("tenant")).hexdigest(8)

    @cached_property
    def id_key(self) -> bytes:
        return self.epoch.derive(f"id {self.id}")

    @cached_property
    def cut(self) -> int:
        """Secret odd factor that chooses the cuts, so that chunk sizes do not give contents away by themselves."""
        return int.from_bytes(self.epoch.derive(f"cut {self.id}")[:8], "little") | 1

    def chunk_key(self, chunk_id: bytes) -> bytes:
        return self.epoch.derive(f"chunk {self.id} {chunk_id.hex()}")

    @property
    def prefix(self) -> str:
        return f"chunk/{self.epoch.id.hex()}/{self.id}"


class Splitter:
    """Cuts one stream into chunks. Iterate for the chunks' pages; afterwards `runs` and `size` describe the stream."""

    def __init__(self, file: BinaryIO, cut: int) -> None:
        self.runs: list[tuple[int, int]] = []
        self.size = 0
        self._file = file
        self._cut = cut

    def __iter__(self) -> Iterator[bytes]:
        parts: list[memoryview] = []  # of blocks, so that their bytes are copied once, when they are joined
        pages = zeros = data = 0
        for block in self._blocks():
            start, view = -1, memoryview(block)  # start of the current data pages within this block
            for at in range(0, len(block), PAGE):
                if block.startswith(_ZERO, at):
                    if start >= 0:
                        parts.append(view[start:at])
                        start = -1
                    if data:
                        self.runs.append((zeros, data))
                        zeros = data = 0
                    zeros += 1
                    continue
                if start < 0:
                    start = at
                data += 1
                pages += 1
                if pages >= MIN_PAGES and (pages == MAX_PAGES or self._cuts_after(view, at)):
                    parts.append(view[start : at + PAGE])
                    start = -1
                    yield b"".join(parts)
                    parts.clear()
                    pages = 0
            if start >= 0:
                parts.append(view[start:])
        if parts:
            yield b"".join(parts)
        if zeros or data:
            self.runs.append((zeros, data))

    def _cuts_after(self, block: memoryview, at: int) -> bool:
        """A keyed choice of one page in 256 (multiply-shift); 0.2 s per GB, most of it the CRC of whole pages."""
        return (zlib.crc32(block[at : at + PAGE]) * self._cut & 0xFFFFFFFFFFFFFFFF) >> 40 & (_MEAN - 1) == 0

    def _blocks(self) -> Iterator[bytes]:
        while block := self._file.read(_BLOCK):
            self.size += len(block)
            yield block + bytes(-len(block) % PAGE)


class Chunks:
    """The chunks of one tenant in a store."""

    def __init__(self, objects: Objects, tenant: Tenant) -> None:
        self._objects = objects
        self.tenant = tenant
        self._of_thread = threading.local()

    def id(self, pages: bytes | memoryview) -> bytes:
        return blake3(pages, key=self.tenant.id_key).digest()

    def name(self, chunk_id: bytes) -> str:
        return f"{self.tenant.prefix}/{chunk_id.hex()}"

    def present(self) -> dict[bytes, int]:
        """What the store has already: id -> stored size in bytes. One request per thousand chunks."""
        return {
            bytes.fromhex(info.name.rsplit("/", 1)[1]): info.size
            for info in self._objects.list(self.tenant.prefix)
            if info.size > _EMPTY_OBJECT
        }

    def seal(self, chunk_id: bytes, pages: bytes) -> bytearray:
        return seal(self.tenant.chunk_key(chunk_id), Kind.CHUNK, self.name(chunk_id), pages)

    def store(self, chunk_id: bytes, sealed: Data) -> None:
        self._objects.put(self.name(chunk_id), sealed)
        faults.point("publish.chunk")

    def get(self, chunk_id: bytes, pages: int, *, fresh: bool = False) -> bytes | memoryview:
        """The chunk's pages, good until this thread's next call.

        Raises ObjectMissing, StoreError, and Untrusted for other bytes than were stored.
        """
        data = self._objects.get(self.name(chunk_id), limit=stored_limit(Kind.CHUNK), fresh=fresh)
        plain = self.open(chunk_id, data)
        if len(plain) != pages * PAGE:
            raise Untrusted(f"{self.name(chunk_id)} holds {len(plain)} bytes, not {pages} pages")
        return plain

    def open(self, chunk_id: bytes, sealed: bytes | memoryview) -> bytes | memoryview:
        """The pages in a chunk's object, good until this thread's next call. Raises Untrusted."""
        name = self.name(chunk_id)
        scratch = self._of_thread.__dict__.setdefault("scratch", bytearray())
        plain = unseal_into(scratch, self.tenant.chunk_key(chunk_id), Kind.CHUNK, name, sealed)
        if self.id(plain) != chunk_id:
            raise Untrusted(f"{name} holds other pages than its name says")
        return plain
