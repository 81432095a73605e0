"""A TOML file as text, as data, and as lines: where in the file a key was written.

``tomllib`` gives data without positions. Users fix a file by its lines, so a small scanner finds them; it is
only asked when there is something to say, and it may answer "not known" (None), never wrongly refuse a file.

Guarantees: ``read`` returns a document or raises ConfigError, whatever the bytes are. It does not follow
what is no regular file (a FIFO would block it), and it bounds size and nesting before it parses.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from relume.errors import ConfigError

MAX_BYTES = 256 * 1024
"""More than any file written by hand; a model checked in under the wrong name is refused before parsing."""

_MAX_DOTS = 200
"""Dotted parts of one key. tomllib's time is quadratic in them; real keys have six."""

_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")
_HEADER = re.compile(r"\s*\[{1,2}(?P<key>[^#]+?)\]{1,2}\s*(?:#.*)?$")
_BARE = re.compile(r"[A-Za-z0-9_.-]+")
_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_KEY = re.compile(rf"\s*(?P<key>{_PART}(?:[ \t]*\.[ \t]*{_PART})*)\s*=(?P<rest>.*)", re.DOTALL)
_LITERAL = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*|[\[\]{}]')


class Spelled(float):
    """A TOML float that remembers how it was written: ``3.10`` is a version to people, 3.1 to TOML."""

    text: str

    def __new__(cls, text: str) -> Spelled:
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Document:
    """A parsed file. ``data`` is what tomllib made of ``text``, floats as ``Spelled``."""

    path: Path
    text: str
    data: dict[str, Any]

    @cached_property
    def _lines(self) -> dict[tuple[str, ...], int]:
        return _scan(self.text)

    def line(self, path: tuple[str, ...]) -> int | None:
        """The line that a key was written in, or its nearest enclosing table's; None where neither is.

        A table that is only there in the header of one within it has that line.
        """
        if path not in self._lines:
            within = [line for key, line in self._lines.items() if key[: len(path)] == path]
            if within:
                return min(within)
        while path:
            if (line := self._lines.get(path)) is not None:
                return line
            path = path[:-1]
        return None


def read(path: Path, *, hint_if_missing: str) -> Document:
    """Read and parse a TOML file.

    Raises ConfigError: missing, not a regular file, unreadable, larger than MAX_BYTES, not UTF-8, not TOML.
    """
    raw = _bytes_of(path, hint_if_missing)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}",
            hint="save the file as UTF-8 (a TOML file is always UTF-8)",
            file=str(path),
            line=line,
        ) from None
    return Document(path, text, _parse(path, text))


def _bytes_of(path: Path, hint_if_missing: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:  # noqa: PTH123  (a descriptor, opened so that a FIFO cannot block)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: not a regular file", hint=hint_if_missing, file=str(path))
            raw = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{path}: no such file", hint=hint_if_missing, file=str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: cannot be read: {what}", file=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"{path}: larger than {MAX_BYTES // 1024} KiB",
            hint=f"at most {MAX_BYTES // 1024} KiB is read; is this the right file?",
            file=str(path),
            allowed=f"at most {MAX_BYTES} bytes",
        )
    return raw


def _parse(path: Path, text: str) -> dict[str, Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.partition("=")[0].count(".") > _MAX_DOTS:
            raise ConfigError(
                f"{path}:{number}: a key of more than {_MAX_DOTS} parts", file=str(path), line=number
            )
    try:
        return tomllib.loads(text, parse_float=Spelled)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep", file=str(path)) from None
    except ValueError as error:  # TOMLDecodeError; also numbers of more digits than Python converts
        what = str(error)
        found = _AT_LINE.search(what)
        line_number = int(found[1]) if found else None
        place = f"{path}:{line_number}" if line_number else str(path)
        raise ConfigError(
            f"{place}: not TOML: {what[:200]}",
            hint="text needs quotes, lists need [ ], tables a [header]; see https://toml.io",
            file=str(path),
            line=line_number,
        ) from None


def _scan(text: str) -> dict[tuple[str, ...], int]:
    """Path -> line (from 1) for headers and ``key = value`` lines outside of multi-line values."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    depth, quote = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        rest = line
        if not depth and not quote:
            if header := _HEADER.match(line):
                table = _path(header["key"])
                if table:
                    lines.setdefault(table, number)
                continue
            if not (pair := _KEY.match(line)):
                continue
            for end in range(1, len(key := _path(pair["key"])) + 1):
                lines.setdefault(table + key[:end], number)
            rest = pair["rest"]
        depth, quote = _open_after(rest, depth, quote)
    return lines


def _open_after(rest: str, depth: int, quote: str) -> tuple[int, str]:
    """How many brackets, and which multi-line quote, are still open at the end of a line."""
    at = 0
    while True:
        if quote:
            end = rest.find(quote, at)
            if end < 0:
                return depth, quote
            at, quote = end + 3, ""
        found = _LITERAL.search(rest, at)
        if not found:
            return depth, ""
        at = found.end()
        token = found[0]
        if token in ('"""', "'''"):
            quote = token
        elif token in "[{":
            depth += 1
        elif token in "]}":
            depth = max(0, depth - 1)


def _path(key: str) -> tuple[str, ...]:
    """The parts of a written key; () where it is none. Quoted keys are left to tomllib."""
    if _BARE.fullmatch(key):
        return tuple(key.split("."))
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except (ValueError, RecursionError):
        return ()
    parts: list[str] = []
    while isinstance(node, dict):
        part, node = next(iter(node.items()))
        parts.append(part)
    return tuple(parts)
