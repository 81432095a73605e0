"""The files of the writable layer that come along with a checkpoint.

A restored copy starts with a fresh writable layer; files written before the checkpoint are not there. But
what processes still hold must be, or CRIU cannot open it again ("Can't open file tmp/... on restore"), or
opens it with another size. :func:`capture` copies it while everything is frozen, :func:`lay` puts the copy
into a fresh layer, :func:`survey` says what was left behind.

Guarantees: what a process held at the freeze is in the copy as it was at the freeze, with the directories
above it, mode, times, extended attributes, holes, and owners as the container sees them (0-based). Directories
that the app made are in it too, empty but for what was held (:func:`add_directories`): a program makes them once,
at its start, and writes into them for as long as it runs.
Not: device and inode numbers (see the warnings of :class:`HeldReport`), names that nobody held, and what
CRIU keeps by itself: deleted files without any name ("ghosts"), and everything on a tmpfs of the container,
``/dev/shm`` with its POSIX semaphores among them.

How CRIU 4.2 treats each kind, which decides what must be copied (criu/files-reg.c, sk-unix.c, fsnotify.c):

- open or mapped, name there: opened again by name, size and mode compared. Copied.
- deleted, no name left: content in the images. Nothing copied but the whiteout that hides an older file.
- deleted, another name left: CRIU makes a hard link ``link_remap.ID`` beside the old name for the time of the
  dump, and wants it at the restore. Copied; that is why the copy is made in the ``post-dump`` action script.
- bound unix socket: unlinked and bound again. Its directories must be there; the socket file is copied so
  that it hides a file of a lower layer by that name (bind would answer EADDRINUSE). One whose name is another by
  now would come back by the old name, or by none: the report has such names, for relume.engine.edit.
- inotify watch: set again by path, which must be there.

Where the whole layer was saved, it serves as the topmost lower layer of each copy of the app, at no cost. Not so for
files that are open or mapped shared. The first write to a file of a lower layer makes another file of it (overlay
copies it up), which whoever mapped it before does not see, and takes it apart from its other names. In the original
they lay in the upper layer: :func:`capture` notes them, with all their names, and :func:`lay` puts them there again.

Standard library only: the keeper runs this.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from relume.engine._culprit import Culprit
from relume.engine._held_finder import Finder, Held, mapped_shared, sqlite_warnings
from relume.engine._held_tree import DEEPEST, Copier, Shift, Tree, is_whiteout
from relume.errors import Unsupported, Untrusted

_ID_COUNT = 65536
_NOBODY = 65534
_LINK_REMAP = "link_remap."
_NAMES_SHOWN = 10
_DIRECTORIES_ADDED = 1000
# How overlay marks a directory of the writable layer that goes on from one of a lower layer, in any case
# (copy_up.c, ovl_set_origin).
_COPIED_UP = "trusted.overlay.origin"


@dataclasses.dataclass(frozen=True, slots=True)
class HeldReport:
    """What :func:`capture` copied: ``files`` regular files, ``bytes`` of data in them (holes not counted).

    ``warnings`` are sentences for the answer to the app: what was saved and will still not be right. ``own_files``
    are for :func:`lay`: of a layer that was saved whole, the files that each copy must have in its upper layer, as
    paths from the root, their bytes written as in a URL (a name need be no UTF-8, and JSON holds nothing else).
    ``sockets`` are the names that unix sockets have instead of the one they were bound by, by the inode number of the
    socket, written likewise.
    """

    files: int
    bytes: int
    warnings: tuple[str, ...] = ()
    own_files: tuple[str, ...] = ()
    sockets: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class LeftBehind:
    """Files of the writable layer that no copy will have. Caches (rebuilt when missing) are counted apart.

    ``names`` are the first ten paths inside, those that are no caches before those that are.
    """

    count: int
    bytes: int
    cache_count: int
    cache_bytes: int
    names: tuple[str, ...]
    hint: str = ""


def capture(
    pids: Sequence[int],
    *,
    upper: Path,
    rootfs: Path,
    dest: Path,
    id_base: int,
    limit_bytes: int,
    everything: bool,
    also: Iterable[str] = (),
    abandoned: Callable[[], bool] = lambda: False,
) -> HeldReport:
    """Copy what ``pids`` (host pids of all processes of one container, frozen) hold of ``upper`` to ``dest``.

    ``upper`` is the upper directory of the overlay that is mounted on ``rootfs``; ``dest`` is an empty
    directory. To be called between CRIU's dump and the thaw, while its ``link_remap.*`` names are there.
    ``everything`` copies the whole layer, whiteouts and opaque directories included, so that ``dest`` can
    serve as a lower layer. ``limit_bytes`` is for each file that is held, as it lies on disk; with ``everything`` a
    larger one is none of ``own_files``, since those are copied at every start, and comes along. ``also`` are paths
    inside that come along, where the layer has them, though nobody holds them.

    Raises Unsupported, with culprits, for a held file over the limit; OSError when the disk is full; Abandoned of
    _held_tree.py soon after ``abandoned`` says that nobody waits for it.
    """
    finder = Finder(rootfs)
    held = finder.find(pids)
    warnings = sqlite_warnings(held)
    own_files: list[str] = []
    source = Tree(upper)
    copier = Copier(source, dest, _as_inside(id_base), abandoned=abandoned)
    try:
        copier.directory("")
        if everything:
            own, too_large_ones = _own_files(source, held, mapped_shared(pids), limit_bytes)
            names = []
            for path, there in source.walk():
                names.append(path)
                if there.st_ino in own and stat.S_ISREG(there.st_mode):
                    own_files.append(quote(os.fsencode(path)))
            warnings += too_large_ones
        else:
            names = _names(source, held, limit_bytes, also)
        for path in names:
            status = source.stat(path)
            if status is not None:
                copier.entry(path, status)
        copier.finish()
    finally:
        copier.close()
        source.close()
    sockets = {str(inode): quote(os.fsencode(path)) for inode, path in finder.sockets.items()}
    return HeldReport(copier.files, copier.bytes, tuple(warnings), tuple(own_files), sockets)


def add_directories(upper: Path, dest: Path, *, id_base: int, mounted: Collection[str] = ()) -> None:
    """Add to ``dest`` the directories of ``upper`` that the app made and nobody held.

    To be called after the thaw, for it walks the whole layer. At most a thousand are added, those nearest to the root,
    since each start makes them anew. Not added: directories of a lower layer that the app only changed, and what the
    runtime made: owners outside the container's range, and what is ``mounted``.
    """
    layer = Tree(upper)
    copier = Copier(layer, dest, _as_inside(id_base), onto=True)
    made = []
    try:
        for path, status in layer.walk():
            if not stat.S_ISDIR(status.st_mode) or f"/{path}" in mounted:
                continue
            try:
                marks = os.listxattr(layer.directory(path))
            except (FileNotFoundError, NotADirectoryError):
                continue
            if _COPIED_UP not in marks and _is_inside(status.st_uid, id_base):
                made.append(path)
        for path in sorted(made, key=lambda path: path.count("/"))[:_DIRECTORIES_ADDED]:
            copier.directory(path)
        copier.finish()
    finally:
        copier.close()
        layer.close()


def expected_bytes(pids: Sequence[int], *, rootfs: Path, upper: Path) -> int:
    """Bytes on disk of the files that :func:`capture` would copy if all froze now; directories and names aside."""
    source = Tree(upper)
    try:
        files = {
            status.st_ino: status.st_blocks * 512
            for one in Finder(rootfs).find(pids)
            if (status := source.stat(one.path)) is not None and stat.S_ISREG(status.st_mode)
        }
    finally:
        source.close()
    return sum(files.values())


def lay(src: Path, upper: Path, *, id_base: int, only: Iterable[str] | None = None) -> None:
    """Put the tree ``src`` (a ``dest`` of :func:`capture`) into ``upper``, owners shifted by ``id_base``.

    ``upper`` must be an empty directory and no overlay mounted on it yet. It becomes the container's ``/``
    with owner, mode and times from ``src``. Any overlay options and any lower layers will do afterwards,
    because nothing in the tree says which inodes it was once copied up from (see _held_tree.py).
    ``only`` (``own_files`` of a report) is for a copy that has all of ``src`` as its topmost lower layer; the
    directory itself is laid in any case.

    Raises Untrusted for an owner outside the container's range, and for a path in ``only`` that leads out of ``src``.
    """
    source = Tree(src)
    copier = Copier(source, upper, _from_inside(src, id_base), above=only is not None)
    try:
        copier.directory("")
        for path, status in source.walk() if only is None else _listed(source, src, only):
            copier.entry(path, status)
        copier.finish()
    finally:
        copier.close()
        source.close()


def survey(upper: Path, dest: Path, *, id_base: int, mounted: Collection[str] = ()) -> LeftBehind:
    """Which files of ``upper`` are not in ``dest``; to be called after the thaw, for it walks all of it.

    What the app has not made does not count: owners outside its range, and the empty files that the runtime puts
    where something is to be ``mounted`` (paths inside).
    """
    counts, sizes = [0, 0], [0, 0]
    names: tuple[list[str], list[str]] = ([], [])
    layer, copy = Tree(upper), Tree(dest)
    try:
        for path, status in layer.walk():
            copy.trim()
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
                continue
            if not _is_inside(status.st_uid, id_base) or f"/{path}" in mounted:
                continue
            if copy.stat(path) is not None:
                continue
            kind = _is_cache(path)
            counts[kind] += 1
            sizes[kind] += min(status.st_size, status.st_blocks * 512)
            if len(names[kind]) < _NAMES_SHOWN:
                names[kind].append(f"/{path}")
    finally:
        layer.close()
        copy.close()
    hint = (
        'files written before the checkpoint are not in its copies; [relume.checkpoint] filesystem = "all"'
        " saves them too"
    )
    return LeftBehind(
        count=sum(counts),
        bytes=sum(sizes),
        cache_count=counts[1],
        cache_bytes=sizes[1],
        names=tuple((names[0] + names[1])[:_NAMES_SHOWN]),
        hint=hint if counts[0] else "",
    )


def _is_inside(owner: int, id_base: int) -> bool:
    """Whether ``owner``, a uid or gid out here, is one of the container's."""
    return 0 <= owner - id_base < _ID_COUNT


def _as_inside(id_base: int) -> Shift:
    """From an owner out here to the same as it looks inside."""
    return lambda owner: owner - id_base if _is_inside(owner, id_base) else _NOBODY


def _from_inside(src: Path, id_base: int) -> Shift:
    """Back again. Raises Untrusted for an owner that no container has."""

    def shift(owner: int) -> int:
        if not 0 <= owner < _ID_COUNT:
            raise Untrusted(f"a held file in {src} belongs to id {owner}, which no container has")
        return owner + id_base

    return shift


def _names(source: Tree, held: Sequence[Held], limit_bytes: int, also: Iterable[str]) -> list[str]:
    """The paths of the layer to copy. Directories above a held file come along where the layer has them."""
    wanted: dict[str, os.stat_result] = {}
    bereft: set[str] = set()  # directories in which a held file lost its name, and those above
    for one in held:
        _refuse(too_deep(one))
        above = _above(one.path)
        for name in (*above, one.path):
            if name in wanted or (status := source.stat(name)) is None:
                continue
            if name == one.path and one.deleted and not is_whiteout(status):
                continue  # another file took the name
            if name == one.path and stat.S_ISREG(status.st_mode):
                _refuse(too_large(one, status.st_blocks * 512, limit_bytes))
            wanted[name] = status
        if one.deleted:
            bereft.update(above)
    wanted |= {
        name: status for name in _link_remaps(source, bereft) if (status := source.stat(name)) is not None
    }
    for path in (path.strip("/") for path in also):
        for name in (*_above(path), path):
            if name not in wanted and (status := source.stat(name)) is not None:
                wanted[name] = status
    if linked := _known_by_other_names(source, wanted):  # a held file is held under all its names
        wanted |= {path: status for path, status in source.walk() if status.st_ino in linked}
    return list(wanted)


def _own_files(
    source: Tree, held: Sequence[Held], shared: Collection[str], limit_bytes: int
) -> tuple[set[int], list[str]]:
    """The inodes of ``own_files``, and a sentence for each mapped file that is too large to be one of them.

    What is only mapped privately stays below, ``shared`` are the paths that are not: programs, libraries and weights
    are most of what is mapped, and nobody writes to them.
    """
    files: dict[int, int] = {}
    warnings = []
    bereft: set[str] = set()
    for one in held:
        if one.deleted:
            bereft.update(_above(one.path))
            continue
        if one.how == "executable" or (one.how == "mapped" and one.path not in shared):
            continue
        status = source.stat(one.path)
        if status is None or not stat.S_ISREG(status.st_mode):
            continue
        files[status.st_ino] = status.st_blocks * 512
        if one.how == "mapped" and files[status.st_ino] > limit_bytes:
            warnings.append(
                f"{one.process} (pid {one.pid}) has /{one.path} mapped, {files[status.st_ino]} bytes in the writable"
                f" layer; the limit is {limit_bytes} bytes, so it is not copied at every start: in a restored copy"
                " the mapping does not show what is written to the file afterwards."
            )
    for name in _link_remaps(source, bereft):
        if (status := source.stat(name)) is not None and stat.S_ISREG(status.st_mode):
            files[status.st_ino] = status.st_blocks * 512
    return {inode for inode, size in files.items() if size <= limit_bytes}, warnings


def _listed(source: Tree, src: Path, names: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    """The files of ``source`` with these names, written as in a URL. Raises Untrusted for one that leads elsewhere."""
    for name in names:
        path = os.fsdecode(unquote_to_bytes(name))
        if not path or any(part in ("", ".", "..") for part in path.split("/")):
            raise Untrusted(f"{name!r} is no path of a held file in {src}")
        status = source.stat(path)
        if status is not None and stat.S_ISREG(status.st_mode):
            yield path, status


def _known_by_other_names(source: Tree, wanted: Mapping[str, os.stat_result]) -> set[int]:
    """The inodes of regular files that the layer has under more names than are ``wanted``.

    To look for them means to walk all of the layer while the app stands still. One link more is no name of the layer's:
    overlay keeps a link in its index for what it has copied up.
    """
    files = {path: status for path, status in wanted.items() if stat.S_ISREG(status.st_mode)}
    known = Counter(status.st_ino for status in files.values())
    return {
        status.st_ino
        for path, status in files.items()
        if status.st_nlink > known[status.st_ino]
        and status.st_nlink > known[status.st_ino] + (_COPIED_UP in source.attributes(path))
    }


def _above(path: str) -> list[str]:
    """The directories above ``path``, the root ("") first."""
    return ["", *(path[:index] for index, letter in enumerate(path) if letter == "/")] if path else []


def _link_remaps(source: Tree, directories: Iterable[str]) -> list[str]:
    """CRIU's temporary names: in the directory of the deleted name or, where that is gone, one above it."""
    return [
        f"{directory}/{name}" if directory else name
        for directory in directories
        if (status := source.stat(directory)) is not None and stat.S_ISDIR(status.st_mode)
        for name in source.names(directory)
        if name.startswith(_LINK_REMAP)
    ]


def too_large(one: Held, size: int, limit: int) -> Culprit | None:
    """A held file of ``size`` bytes on disk against the limit for one file."""
    if size <= limit:
        return None
    return Culprit(
        one.pid,
        one.process,
        f"holds /{one.path} ({one.how}), {size} bytes in the writable layer; the limit is {limit} bytes",
        "close it before the request, keep it in /persistent-storage, or save the whole layer with"
        ' [relume.checkpoint] filesystem = "all"',
    )


def too_deep(one: Held) -> Culprit | None:
    """A held path that is further below the root than anything is copied from."""
    if one.path.count("/") <= DEEPEST:
        return None
    return Culprit(
        one.pid,
        one.process,
        f"holds /{one.path[:60]}... ({one.how}), {one.path.count('/')} directories deep; the limit is {DEEPEST}",
        "close it before the request, or keep it nearer to the root",
    )


def _refuse(culprit: Culprit | None) -> None:
    if culprit is not None:
        raise Unsupported(str(culprit), hint=culprit.hint, culprits=[culprit.as_dict()])


def _is_cache(path: str) -> bool:
    """Whether what lies there is made again when it is missing, going by the usual names."""
    return path.endswith(".pyc") or any("cache" in part.lower() for part in path.split("/"))
