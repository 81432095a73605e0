"""The app's own files: which ones belong to a build, their digest, and their copy at /cortex.

``include`` and ``exclude`` are lists of patterns. A pattern with a slash (``./main.py`` and ``/main.py`` too) is
matched from the app's directory; one without is matched against the name of every file and directory at any
depth. ``*`` and ``?`` do not cross a slash, ``**`` does. What matches a directory covers everything below it,
and ``exclude`` wins. So ``["./*"]`` is the whole directory, and ``[".*"]`` every hidden name in it.

Never part of a build: the configuration file (its meaning is covered by ``build_id``; its bytes, with their
comments, are not) and ``__pycache__`` directories (the build compiles its own).

Guarantees: nothing outside of the directory is read; a link out of it, a device, FIFO or socket is refused
by name; what was hashed is what is copied, or BuildError.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from blake3 import blake3

from relume.build import tree
from relume.errors import BuildError

_NEVER = frozenset({"__pycache__"})

Kind = Literal["file", "directory", "symlink"]


@dataclasses.dataclass(frozen=True, slots=True)
class AppFile:
    """One entry. ``path`` is relative, with slashes; ``content`` a file's BLAKE3 or a link's target."""

    path: str
    kind: Kind
    mode: int
    size: int
    content: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class AppFiles:
    """The files of an app, parents before children."""

    root: Path
    entries: tuple[AppFile, ...]

    @property
    def digest(self) -> str:
        """64 hex digits over names, types, modes and bytes; not over times, owners or the directory's place."""
        hasher = blake3(b"relume files 1\0")
        for entry in self.entries:
            fields = (os.fsencode(entry.path), entry.kind.encode(), b"%o" % entry.mode, entry.content)
            hasher.update(b"".join(b"%d:%s" % (len(field), field) for field in fields))
        return hasher.hexdigest()

    @property
    def count(self) -> int:
        return sum(entry.kind == "file" for entry in self.entries)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.entries)

    def copy(self, target: Path, check: Callable[[], None] = tree.nothing) -> None:
        """Copy into the existing directory ``target``, owned by 0:0, with times made from content.

        Raises BuildError where a file is no longer what was hashed.
        """
        directories = []
        for entry in self.entries:
            source, place = self.root / entry.path, target / entry.path
            check()
            try:
                if entry.kind == "directory":
                    place.mkdir()
                    directories.append((place, entry.mode))
                elif entry.kind == "symlink":
                    place.symlink_to(os.fsdecode(entry.content))
                else:
                    _copy_file(source, place, entry, check)
            except FileNotFoundError as error:
                raise _changed(entry.path) from error
            _own(place)
        for place, mode in reversed(directories):
            place.chmod(mode)
            os.utime(place, (tree.EPOCH, tree.EPOCH))


def _own(place: Path) -> None:
    if os.geteuid() == 0:
        os.lchown(place, 0, 0)


def _copy_file(source: Path, place: Path, entry: AppFile, check: Callable[[], None]) -> None:
    hasher = blake3()
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _changed(entry.path) from error
    with open(fd, "rb", buffering=0) as reader, place.open("xb", buffering=0) as writer:  # noqa: PTH123
        while block := reader.read(1 << 20):
            hasher.update(block)
            writer.write(block)
            check()
        if hasher.digest() != entry.content:
            raise _changed(entry.path)
        _own(place)
        os.fchmod(writer.fileno(), entry.mode)
    moment = tree.content_time(entry.content)
    os.utime(place, (moment, moment))


def _changed(path: str) -> BuildError:
    return BuildError(
        f"{path} changed while it was being copied", hint="deploy again when nothing writes there"
    )


def scan(
    root: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    config_name: str = "cerebrium.toml",
    check: Callable[[], None] = tree.nothing,
) -> AppFiles:
    """Find and hash the files of the app in ``root``; ``config_name`` is left out.

    Raises BuildError: a link that leads out, a special file, something unreadable.
    """
    included, excluded = Patterns(include), Patterns(exclude)
    found: dict[str, AppFile] = {}
    inside = os.path.realpath(root)

    def visit(relative: str, covered: bool) -> None:
        check()
        with os.scandir(root / relative if relative else root) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        for entry in ordered:
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.name in _NEVER or path == config_name or excluded.match(path):
                continue
            wanted = covered or included.match(path)
            if entry.is_dir(follow_symlinks=False):
                if wanted:
                    found[path] = _directory(entry, path)
                visit(path, wanted)
            elif wanted:
                _add_parents(root, path, found)
                found[path] = _entry(root, inside, path, entry.stat(follow_symlinks=False), check)

    try:
        visit("", False)
    except OSError as error:
        raise BuildError(f"{error.filename}: cannot be read: {error.strerror}") from error
    ordered = tuple(sorted(found.values(), key=lambda entry: os.fsencode(entry.path).split(b"/")))
    return AppFiles(root, ordered)


def _directory(entry: os.DirEntry[str], path: str) -> AppFile:
    mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
    return AppFile(path, "directory", mode, 0, b"")


def _add_parents(root: Path, path: str, found: dict[str, AppFile]) -> None:
    parts = path.split("/")[:-1]
    for end in range(1, len(parts) + 1):
        parent = "/".join(parts[:end])
        if parent not in found:
            mode = stat.S_IMODE((root / parent).lstat().st_mode)
            found[parent] = AppFile(parent, "directory", mode, 0, b"")


def _entry(root: Path, inside: str, path: str, status: os.stat_result, check: Callable[[], None]) -> AppFile:
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISREG(status.st_mode):
        return AppFile(path, "file", mode, status.st_size, tree.hash_file(root / path, check))
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(root / path)  # noqa: PTH115  (a str; Path would normalise it)
        leads = os.path.realpath(root / path)
        if target.startswith("/") or not (leads == inside or leads.startswith(inside.rstrip("/") + "/")):
            raise BuildError(
                f"{path} links to {target}, outside of the app's directory",
                hint="copy what it points to, make the link relative, or name it in `exclude`",
                path=path,
            )
        return AppFile(path, "symlink", 0o777, 0, os.fsencode(target))
    kinds = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    raise BuildError(
        f"{path} is a {kinds.get(stat.S_IFMT(status.st_mode), 'special file')}, which cannot be deployed",
        hint="remove it, or name it in `exclude`",
        path=path,
    )


class Patterns:
    """A list of patterns, compiled. ``match`` looks at one path, not at its parents.

    Raises BuildError for one that means nothing, as ``[z-a]`` does.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        named: list[str] = []
        anchored: list[str] = []
        for pattern in patterns:
            text = pattern.strip()
            text = text.removeprefix("./") if (rooted := text.startswith("./")) else text
            rooted = rooted or "/" in text.rstrip("/")
            text = text.strip("/")
            if text in ("", "."):  # "." and "./" name the directory itself: everything in it
                text, rooted = "**", True
            (anchored if rooted else named).append(_checked(text, pattern))
        self._named = re.compile("|".join(named)) if named else None
        self._anchored = re.compile("|".join(anchored)) if anchored else None

    def match(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        return bool(
            (self._named and self._named.fullmatch(name))
            or (self._anchored and self._anchored.fullmatch(path))
        )


def _checked(text: str, pattern: str) -> str:
    expression = _regex(text)
    try:
        re.compile(expression)
    except re.error as error:
        raise BuildError(
            f"{pattern!r} is no pattern of files: {error.msg}",
            hint="see `include` and `exclude` in cerebrium.toml",
        ) from error
    return expression


_TOKEN = re.compile(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]|.", re.DOTALL)


def _regex(pattern: str) -> str:
    """A glob as a regular expression (without anchors, in a group of its own)."""
    parts = []
    for token in _TOKEN.findall(pattern):
        if token == "**/":
            parts.append("(?:.*/)?")
        elif token == "**":
            parts.append(".*")
        elif token == "*":
            parts.append("[^/]*")
        elif token == "?":
            parts.append("[^/]")
        elif token[0] == "[" and len(token) > 2 and token not in ("[!]", "[^]"):
            # Nothing but a range means more in a glob's set.
            inner = re.sub(r"([\\\[&~|])", r"\\\1", token[1:-1])
            inner = "^" + inner[1:] if inner[0] in "!^" else inner
            parts.append(f"[{inner}]")
        else:
            parts.append(re.escape(token))
    return f"(?s:{''.join(parts)})"
