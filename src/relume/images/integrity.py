"""Whether the images still hold the bytes that the dump wrote.

CRIU restores a flipped bit without a word. So :func:`record` hashes a checkpoint's files once, after the
thaw, into ``integrity.json`` beside them: the small images whole, ``pages-*.img`` in blocks of 2 MiB.
:class:`Verifier` checks them on first use. What was checked is remembered for the rest of this boot of the
machine, per file (device, inode, change time, size) and block, so that only the first restore pays.

Guarantees: bytes handed out as verified had the recorded hash when they were first read in this boot.
Does not: protect from somebody who can write both the images and the record (the store signs its
manifests), nor from a disk that returns other bytes at a second reading in the same boot.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from relume.errors import ImageError, Untrusted
from relume.linux.process import boot_id

BLOCK_BYTES = 2 << 20
RECORD_NAME = "integrity.json"

_VERSION = 1
_REMEDY = "the checkpoint is damaged; it must be taken again or fetched again"


@dataclass(frozen=True, slots=True)
class Record:
    """``files``: name -> (bytes, BLAKE3) of small images; ``pages``: name -> (bytes, BLAKE3 of each block)."""

    files: dict[str, tuple[int, bytes]]
    pages: dict[str, tuple[int, tuple[bytes, ...]]]


def record(directory: Path) -> Record:
    """Hashes the images in ``directory`` and writes the record beside them. To be called after the last edit.

    Reads every byte once (from the page cache, right after a dump), in the caller's thread. Raises OSError.
    """
    files: dict[str, tuple[int, bytes]] = {}
    pages: dict[str, tuple[int, tuple[bytes, ...]]] = {}
    for path in sorted(_images(directory)):
        if _is_pages(path.name):
            blocks = tuple(_blocks(path))
            pages[path.name] = (path.stat().st_size, blocks)
        else:
            data = path.read_bytes()
            files[path.name] = (len(data), blake3(data).digest())
    body = json.dumps(
        {
            "version": _VERSION,
            "block_bytes": BLOCK_BYTES,
            "files": {name: [size, digest.hex()] for name, (size, digest) in files.items()},
            "pages": {
                name: [size, [block.hex() for block in blocks]] for name, (size, blocks) in pages.items()
            },
        },
        sort_keys=True,
    ).encode()
    temporary = directory / f".{RECORD_NAME}.new"
    temporary.write_bytes(body + b"\n" + blake3(body).hexdigest().encode() + b"\n")
    temporary.rename(directory / RECORD_NAME)
    return Record(files, pages)


def read_record(directory: Path) -> Record | None:
    """The record in ``directory``; None where there is none. Raises ImageError when it is damaged or newer."""
    path = directory / RECORD_NAME
    try:
        body, _, checksum = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if blake3(body).hexdigest().encode() != checksum.strip():
        raise ImageError(f"{path}: is damaged", hint=_REMEDY)
    content = json.loads(body)
    if content["version"] != _VERSION or content["block_bytes"] != BLOCK_BYTES:
        raise ImageError(
            f"{path}: version {content['version']} is not known here", hint="written by a newer relume?"
        )
    return Record(
        {name: (size, bytes.fromhex(digest)) for name, (size, digest) in content["files"].items()},
        {
            name: (size, tuple(bytes.fromhex(block) for block in blocks))
            for name, (size, blocks) in content["pages"].items()
        },
    )


class Verifier:
    """Checks the images of one checkpoint, each block once per boot.

    ``runtime`` is a folder for the memory of what was checked (``/run/relume/...``), shared by all restores
    on the machine; without one this object remembers for itself. Safe to use from several threads and
    processes: two that check the same block at once both do it.
    """

    def __init__(self, directory: Path, runtime: Path | None = None) -> None:
        """Raises ImageError where ``directory`` has no record or a bad one."""
        found = read_record(directory)
        if found is None:
            raise ImageError(f"{directory}: has no {RECORD_NAME}", hint="take a new checkpoint")
        self._directory = directory
        self._record = found
        self._runtime = _of_this_boot(runtime) if runtime else None

    def check_small(self) -> None:
        """Compares every small image with its recorded hash, and the pages files with their recorded size.

        Raises Untrusted; ImageError when a file is missing or a pages file has another size.
        """
        present = {path.name for path in _images(self._directory)}
        recorded = self._record.files.keys() | self._record.pages.keys()
        if missing := sorted(recorded - present):
            raise ImageError(f"{self._directory}: {missing[0]} is missing", hint=_REMEDY)
        if surplus := sorted(present - recorded):
            raise Untrusted(f"{self._directory}: {surplus[0]} is not in the record", hint=_REMEDY)
        for name, (size, _) in self._record.pages.items():
            _check_size(self._directory / name, size)
        for name, (_, digest) in self._record.files.items():
            path = self._directory / name
            with self._memory(path, 1) as seen:
                if not seen[0]:
                    if blake3(path.read_bytes()).digest() != digest:
                        raise Untrusted(f"{path}: is not what was written at the checkpoint", hint=_REMEDY)
                    seen[0] = 1

    def pages(self, path: Path) -> PagesVerifier:
        """The checker of one pages file. Raises ImageError where it is unknown or has another size."""
        known = self._record.pages.get(path.name)
        if known is None:
            raise ImageError(f"{path}: is not in the record", hint=_REMEDY)
        size, blocks = known
        _check_size(path, size)
        return PagesVerifier(path, blocks, self._memory(path, len(blocks)))

    def _memory(self, path: Path, count: int) -> _Memory:
        if self._runtime is None:
            return _Memory(None, count)
        return _Memory(self._runtime / _name(path), count)


def forget(directory: Path, runtime: Path) -> None:
    """Removes what ``runtime`` remembers of the images in ``directory``, which are about to go."""
    if (current := _of_this_boot(runtime)) is None:
        return
    for path in _images(directory):
        with contextlib.suppress(OSError):
            (current / _name(path)).unlink()


class PagesVerifier:
    """Checks blocks of one pages file, mapped or read."""

    def __init__(self, path: Path, blocks: tuple[bytes, ...], memory: _Memory) -> None:
        self._path = path
        self._blocks = blocks
        self._memory = memory
        self._seen = memory.__enter__()
        self.hashed_bytes = 0
        """How much had to be hashed so far; 0 where all was known."""

    def known(self, offset: int, length: int) -> bool:
        """Whether all blocks of the range are verified already."""
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        return 0 not in self._seen[first : last + 1]

    def check(self, content: memoryview, offset: int, length: int) -> None:
        """Verifies the blocks that hold ``length`` bytes at ``offset``; ``content`` is the whole file, mapped.

        Raises Untrusted. Hashing leaves the GIL.
        """
        for index in range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1):
            if self._seen[index]:
                continue
            self._check(index, content[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])

    def check_all(self) -> None:
        """Verifies the whole file. Raises Untrusted; ImageError where it cannot be read; OSError.

        Reads it: what cannot be read of a mapped file is a SIGBUS, which nobody survives.
        """
        buffer = memoryview(bytearray(BLOCK_BYTES))
        with self._path.open("rb", buffering=0) as file:
            for index in range(len(self._blocks)):
                if self._seen[index]:
                    continue
                try:
                    file.seek(index * BLOCK_BYTES)
                    block = _filled(buffer, file)
                except OSError as error:
                    raise ImageError(f"{self._path}: cannot be read: {error}", hint=_REMEDY) from error
                self._check(index, block)

    def _check(self, index: int, block: memoryview) -> None:
        if blake3(block).digest() != self._blocks[index]:
            raise Untrusted(
                f"{self._path}: the 2 MiB at {index * BLOCK_BYTES:#x} are not what was written at the checkpoint",
                hint=_REMEDY,
            )
        self.hashed_bytes += len(block)
        self._seen[index] = 1

    def close(self) -> None:
        """Lets go of the memory. Nothing may be checked after it."""
        self._memory.__exit__(None, None, None)


class _Memory(contextlib.AbstractContextManager["bytearray | mmap.mmap"]):
    """One byte per block, 1 when verified: a mapped file, so that processes share it without locks.

    Where there is no room for the file, this object remembers for itself.
    """

    def __init__(self, path: Path | None, count: int) -> None:
        self._path = path
        self._count = max(count, 1)
        self._mapped: mmap.mmap | None = None

    def __enter__(self) -> bytearray | mmap.mmap:
        if self._path is None:
            return bytearray(self._count)
        try:
            self._mapped = _mapped(self._path, self._count)
        except OSError:
            return bytearray(self._count)
        return self._mapped

    def __exit__(self, *_: object) -> None:
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


def _mapped(path: Path, size: int) -> mmap.mmap:
    """``size`` bytes of ``path``, made where it is not there. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A hole in a full tmpfs would be a SIGBUS at the first write. Same path, same size: see _name.
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


def _name(path: Path) -> str:
    """Names these bytes of a file for as long as the machine runs."""
    status = path.stat()
    return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_ctime_ns:x}-{status.st_size:x}"


def _of_this_boot(runtime: Path) -> Path | None:
    """``runtime``/verified/BOOT; what earlier boots left beside it is removed. None where there is no room for it."""
    current = runtime / "verified" / boot_id()
    try:
        current.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    for other in current.parent.iterdir():
        if other != current:
            shutil.rmtree(other, ignore_errors=True)
    return current


def _images(directory: Path) -> Iterator[Path]:
    return (path for path in directory.glob("*.img") if path.is_file())


def _check_size(path: Path, size: int) -> None:
    if (now := path.stat().st_size) != size:
        raise ImageError(f"{path}: is short or long, {now} bytes instead of {size}", hint=_REMEDY)


def _is_pages(name: str) -> bool:
    return name.startswith("pages-")


def _blocks(path: Path) -> Iterator[bytes]:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while block := _filled(buffer, file):
            yield blake3(block).digest()


def _filled(buffer: memoryview, file: io.RawIOBase) -> memoryview:
    """What ``file`` has next: all of ``buffer``, or what was left."""
    size = 0
    while size < len(buffer) and (count := file.readinto(buffer[size:])):
        size += count
    return buffer[:size]
