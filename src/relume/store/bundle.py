"""Bundles: a checkpoint's small files, the tree of files that its processes held, a layer of a build. All are tars.

Unpacking trusts nothing: an absolute path, a `..`, a name through a symlink, a hard link to the outside, a
device (but in a layer), or an extended attribute that packing would not have made is refused with Untrusted, and
nothing outside the target is ever touched.

The tree keeps what the engine's copy of a writable layer keeps: types (sockets and overlay's whiteouts too, as
empty entries with a `RELUME.kind` header), owners, modes, times in nanoseconds, hard links, holes, and the
extended attributes that matter to an overlay, as `SCHILY.xattr.NAME` headers (the convention of star and GNU tar).
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from relume.errors import StoreError, Untrusted

_BLOCK = 1 << 20
_KIND = "RELUME.kind"
_XATTR = "SCHILY.xattr."
_KEPT_XATTRS = ("user.", "trusted.overlay.", "system.posix_acl_")
_LAYER_XATTRS = (*_KEPT_XATTRS, "security.capability")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
IMAGES = "images"


def is_pages(name: str) -> bool:
    """Is this one of CRIU's page images (`pages-1.img`), which hold memory and nothing else?"""
    return name.startswith("pages-") and name.endswith(".img")


def pack_small(images: Path, companions: Iterable[Path]) -> bytes:
    """Every file of CRIU's image directory but the pages, as `images/NAME`, and `companions`, as `NAME`."""
    out = io.BytesIO()
    files = [(f"{IMAGES}/{path.name}", path) for path in sorted(images.iterdir()) if not is_pages(path.name)]
    files += [(path.name, path) for path in companions]
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in files:
            if path.is_file() and not path.is_symlink():
                info = tarfile.TarInfo(name)
                info.size = path.stat().st_size
                with path.open("rb") as file:
                    tar.addfile(info, file)
    return out.getvalue()


def unpack_small(data: bytes, directory: Path, where: str) -> None:
    """The reverse, into `directory` and its new folder `images`. Raises Untrusted for anything but such files."""
    (directory / IMAGES).mkdir(mode=0o700)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                *folder, name = info.name.split("/")
                if (
                    not info.isreg()
                    or folder not in ([], [IMAGES])
                    or name in ("", ".", "..")
                    or is_pages(name)
                ):
                    raise Untrusted(f"{where} holds {info.name!r}, which is not a small file of a checkpoint")
                _new_file(tar, info, directory / info.name)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise Untrusted(f"{where} is not a bundle of small files: {error}") from None


def pack_tree(directory: Path, out: BinaryIO, *, layer: bool = False) -> None:
    """Write everything below `directory` as a tar to `out`. Raises StoreError for a device node.

    In a `layer` devices and file capabilities are kept, and its first entry is the directory itself.
    """
    xattrs = _LAYER_XATTRS if layer else _KEPT_XATTRS
    first = (directory,) if layer else ()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in (*first, *_walk(directory)):
            name, facts = str(path.relative_to(directory)), path.lstat()
            headers = {"mtime": f"{facts.st_mtime_ns // 10**9}.{facts.st_mtime_ns % 10**9:09d}"}
            if kind := _special(facts):
                info = tarfile.TarInfo(name)
                info.mode, info.uid, info.gid = stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid
                headers[_KIND] = kind
            elif (stat.S_ISCHR(facts.st_mode) or stat.S_ISBLK(facts.st_mode)) and not layer:
                raise StoreError(f"{name} in the held files is a device; it cannot travel with a checkpoint")
            else:
                info = tar.gettarinfo(path, name)
                info.uname = info.gname = ""
                if not info.issym():
                    headers |= {_XATTR + key: value for key, value in _xattrs(path, xattrs)}
            info.pax_headers = headers
            if info.isreg() and not kind:
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)


def unpack_tree(file: BinaryIO, directory: Path, where: str, *, layer: bool = False) -> None:
    """Lay the tree into `directory`, which must be new and empty; `layer` as it was packed.

    Raises Untrusted for a tar that is not one of ours, OSError when the disk is full or the rights are missing;
    then throw `directory` away.
    """
    folders: list[tuple[Path, tarfile.TarInfo]] = []
    xattrs = _LAYER_XATTRS if layer else _KEPT_XATTRS
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if layer and not folders and info.name == "." and info.isdir():
                    folders.append((directory, info))
                    continue
                path = directory / _inside(info.name, directory, where)
                if layer and info.isdev() and not info.isfifo():
                    _make_device(info, path)
                else:
                    _make(tar, info, path, directory, where)
                if info.isdir():
                    folders.append((path, info))
                elif not info.islnk():
                    _dress(path, info, where, xattrs)
    except (tarfile.TarError, FileExistsError, FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Untrusted(f"{where} is not a bundle of files: {error}") from None
    for path, info in reversed(folders):  # last, because making an entry changes its folder's times
        _dress(path, info, where, xattrs)


def _make_device(info: tarfile.TarInfo, path: Path) -> None:
    kind = stat.S_IFCHR if info.ischr() else stat.S_IFBLK
    os.mknod(path, kind | 0o600, os.makedev(info.devmajor, info.devminor))


def _make(tar: tarfile.TarFile, info: tarfile.TarInfo, path: Path, directory: Path, where: str) -> None:
    kind = info.pax_headers.get(_KIND)
    if kind == "whiteout":
        os.mknod(path, stat.S_IFCHR, 0)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind is not None:
        raise Untrusted(f"{where} holds {info.name!r} of unknown kind {kind!r}")
    elif info.isdir():
        path.mkdir(mode=0o700)
    elif info.isreg():
        _new_file(tar, info, path)
    elif info.issym():
        path.symlink_to(info.linkname)  # may point anywhere: nothing of ours ever goes through it
    elif info.islnk():
        os.link(directory / _inside(info.linkname, directory, where), path, follow_symlinks=False)
    elif info.isfifo():
        os.mkfifo(path, 0o600)
    else:
        raise Untrusted(f"{where} holds {info.name!r}, a device or something unknown")


def _new_file(tar: tarfile.TarFile, info: tarfile.TarInfo, path: Path) -> None:
    """The content of a regular entry, 0600, with holes where it is zero."""
    content = tar.extractfile(info)
    assert content is not None
    with os.fdopen(os.open(path, _NEW_FILE, 0o600), "wb") as out:
        while block := content.read(_BLOCK):
            if block.count(0) == len(block):
                out.seek(len(block), os.SEEK_CUR)
            else:
                out.write(block)
        out.truncate(info.size)


def _dress(path: Path, info: tarfile.TarInfo, where: str, xattrs: tuple[str, ...]) -> None:
    """Owner, mode, attributes and times of what was just made, in the order in which they do not undo each other."""
    if os.geteuid() == 0:
        os.chown(path, info.uid, info.gid, follow_symlinks=False)
    if not info.issym():
        path.chmod(info.mode & 0o7777)
    for header, value in info.pax_headers.items():
        if header.startswith(_XATTR):
            name = header.removeprefix(_XATTR)
            if not name.startswith(xattrs):
                raise Untrusted(f"{where}: {info.name!r} has the extended attribute {name!r}")
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
    seconds, _, fraction = info.pax_headers.get("mtime", str(info.mtime)).partition(".")
    mtime = int(seconds) * 10**9 + int(fraction[:9].ljust(9, "0"))
    os.utime(path, ns=(mtime, mtime), follow_symlinks=False)


def _inside(name: str, directory: Path, where: str) -> PurePosixPath:
    """The relative path, if it and every folder on the way lie inside. Raises Untrusted."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise Untrusted(f"{where} holds the path {name!r}, which leads outside")
    for parent in list(path.parents)[:-1]:
        if (directory / parent).is_symlink():
            raise Untrusted(
                f"{where} holds the path {name!r}, which goes through the symlink {str(parent)!r}"
            )
    return path


def _special(facts: os.stat_result) -> str:
    if stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0:
        return "whiteout"
    return "socket" if stat.S_ISSOCK(facts.st_mode) else ""


def _xattrs(path: Path, kept: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(kept):
            yield name, os.getxattr(path, name, follow_symlinks=False).decode("utf-8", "surrogateescape")


def _walk(directory: Path) -> Iterator[Path]:
    """Every path below, folders before what is in them, in a fixed order; symlinks are not followed."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
