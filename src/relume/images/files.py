"""Reading and writing one image file: magic, then entries, each a length, a protobuf message and raw data.

Guarantees: a file that ends early, has an unknown magic or a message that does not parse raises ImageError
with the file's name; nothing partial is returned. A rewritten file appears whole or not at all (new file,
rename) with the owner and mode of the old one.
Does not: read ``pages-*.img`` (raw, see pagemap.py), tarballs and ``ip`` dumps (raw too).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from relume.errors import ImageError
from relume.images.formats import BY_MAGIC, BY_NAME, COMMON, SERVICE, Format

_REMEDY = "take a new checkpoint"


@dataclass(frozen=True, slots=True)
class Entry:
    """A message and the raw bytes that follow it (queued data of a socket or a pipe); mostly none.

    ``message`` is an object of the generated class. Typed Any: its fields depend on the file's kind.
    """

    message: Any
    extra: bytes = b""


def read_image(path: Path) -> list[Any]:
    """The messages of an image, as objects of the generated classes.

    Raises ImageError, also for kinds whose entries have raw data behind them (read_entries gives those),
    so that no caller drops that data by rewriting what it got here.
    """
    kind, entries = read_entries(path)
    if kind.extra is not None:
        raise ImageError(
            f"{path}: {kind.name} entries carry raw data", hint="a caller's mistake: use read_entries"
        )
    return [entry.message for entry in entries]


def read_entries(path: Path) -> tuple[Format, list[Entry]]:
    """The file's format and its entries with their raw data. Raises ImageError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", hint=_REMEDY) from error
    kind, offset = _magic(path, data)
    entries: list[Entry] = []
    while offset < len(data):
        if offset + 4 > len(data):
            raise _short(path, len(data))
        (size,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if offset + size > len(data):
            raise _short(path, len(data))
        message = kind.message_type(len(entries))()
        try:
            message.ParseFromString(data[offset : offset + size])
        except DecodeError as error:
            raise ImageError(f"{path}: entry {len(entries)} is damaged ({error})", hint=_REMEDY) from error
        offset += size
        length = kind.extra(message) if kind.extra else 0
        if offset + length > len(data):
            raise _short(path, len(data))
        entries.append(Entry(message, data[offset : offset + length]))
        offset += length
    return kind, entries


def read_magic(path: Path, name: str) -> bytes:
    """What follows the magic of an image that must be of the format ``name``. Raises ImageError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", hint=_REMEDY) from error
    kind, offset = _magic(path, data)
    if kind.name != name:
        raise ImageError(f"{path}: holds {kind.name}, not {name}", hint=_REMEDY)
    return data[offset:]


def write_image(path: Path, entries: Iterable[Any], *, kind: str = "", sync: bool = False) -> None:
    """Writes messages (or :class:`Entry` objects) as an image, in place of the file that may be there.

    ``kind`` is the format's name ("FILES"); left out, the kind of the existing file is kept. ``sync``
    makes it last through a power cut, at the price of two fsync calls. Raises ImageError.
    """
    known = BY_NAME.get(kind) if kind else _magic(path, _head(path))[0]
    if known is None:
        raise ImageError(f"{path}: no image format named {kind!r}", hint="see relume.images.formats")
    parts = [] if known.prefix is None else [struct.pack("<I", known.prefix)]
    parts.append(struct.pack("<I", known.magic))
    for entry in entries:
        message, extra = (entry.message, entry.extra) if isinstance(entry, Entry) else (entry, b"")
        encoded = message.SerializeToString()
        parts += [struct.pack("<I", len(encoded)), encoded, extra]
    _replace(path, b"".join(parts), sync=sync)


def _magic(path: Path, data: bytes) -> tuple[Format, int]:
    if len(data) < 4:
        raise _short(path, len(data))
    (magic,) = struct.unpack_from("<I", data)
    offset = 4
    if magic in (COMMON, SERVICE):
        if len(data) < 8:
            raise _short(path, len(data))
        (magic,) = struct.unpack_from("<I", data, 4)
        offset = 8
    kind = BY_MAGIC.get(magic)
    if kind is None:
        raise ImageError(
            f"{path}: unknown image format, magic {magic:#010x}", hint="written by another CRIU?"
        )
    if (COMMON if offset == 8 else None) != (COMMON if kind.prefix else None):
        raise ImageError(f"{path}: not in the image format of CRIU 2.0 and later", hint=_REMEDY)
    return kind, offset


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", hint=_REMEDY) from error


def _replace(path: Path, data: bytes, *, sync: bool) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        try:
            old: os.stat_result | None = path.stat()
        except FileNotFoundError:
            old = None
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            if old is not None:
                os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), old.st_mode & 0o7777)
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
        if sync:
            _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ImageError(
            f"{path}: cannot be written ({error.strerror})", hint="room left on the disk?"
        ) from error


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(path: Path, size: int) -> ImageError:
    return ImageError(f"{path}: ends early, after {size} bytes", hint=_REMEDY)
