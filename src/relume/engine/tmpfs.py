"""The contents of tmpfs mounts in CRIU's images, without the processes that CRIU would start for them.

CRIU keeps what lies in a tmpfs as ``tmpfs-dev-*.tar.gz.img`` and runs ``tar``, and tar ``gzip``, for every such mount,
at the dump while the app stands still and at every restore before it runs (criu/filesystems.c, tmpfs_dump and
tmpfs_restore). A container has half a dozen of them: /dev, /dev/shm, the masked folders of /proc and /sys. Nearly all
are empty, and two processes for nothing take 4 ms each on an idle machine, ten times that on a busy one.

So CRIU finds a ``tar`` of ours first, a few lines of sh. At the dump it writes one line for a folder that is empty and
read-only, in which nothing can ever have changed, and leaves gzip out for the rest. Once the app runs again
:func:`lighten` finds the others of which a fresh mount is all there is. All these are described as mounts of a kind of
which CRIU knows the name only ("auto"): it mounts them anew and runs nothing. What has contents goes to the real tar.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Container, Mapping
from pathlib import Path

from relume.errors import HostError, ImageError
from relume.images import read_image, write_image
from relume.images.proto import mnt_pb2

_EMPTY = b"relume: an empty tmpfs\n"
_PLAIN = b"relume: a tar archive follows\n"
_FRESH_AT_MOST = 64 << 10
"""Bytes; the archive of one folder takes 10 KiB, tar's own padding included."""
_DEFAULT_MODE = 0o1777  # tmpfs(5)

_SCRIPT = """\
#!/bin/sh
# The tar that CRIU finds: see relume.engine.tmpfs.
without_gzip() {{
    for word in "$@"; do
        shift
        [ "$word" = --gzip ] || set -- "$@" "$word"
    done
    exec {tar} "$@"
}}
case $1 in
--create)
    first=
    for name in /proc/self/fd/0/* /proc/self/fd/0/.[!.]* /proc/self/fd/0/..?*; do
        if [ -e "$name" ] || [ -L "$name" ]; then first=$name && break; fi
    done
    if [ -z "$first" ] && [ -r /proc/self/fd/0 ] && [ ! -w /proc/self/fd/0 ]; then
        echo {empty}
        exit 0
    fi
    echo {plain}
    without_gzip "$@"
    ;;
--extract)
    read -r line
    case $line in
    {empty}) exit 0 ;;
    {plain}) without_gzip "$@" ;;
    esac
    exec {tar} "$@" </proc/self/fd/0
    ;;
esac
exec {tar} "$@"
"""


def install(directory: Path) -> None:
    """Put the ``tar`` for CRIU into ``directory``; :func:`environment` names it. Raises HostError, OSError."""
    found = shutil.which("tar")
    if found is None:
        raise HostError(
            "tar is not installed", hint="apt-get install tar; CRIU needs it for /dev and /dev/shm"
        )
    directory.mkdir(mode=0o711, exist_ok=True)
    directory.chmod(0o711)  # it runs as the mapped root, who is nobody here
    script = directory / "tar"
    script.write_text(
        _SCRIPT.format(
            tar=shlex.quote(found),
            empty=shlex.quote(_EMPTY.decode().strip()),
            plain=shlex.quote(_PLAIN.decode().strip()),
        )
    )
    script.chmod(0o755)


def environment(base: Mapping[str, str], directory: Path) -> dict[str, str]:
    """``base`` for runc and CRIU, with the ``tar`` in ``directory`` first on their PATH."""
    return {**base, "PATH": f"{directory}:{base.get('PATH', os.defpath)}"}


def lighten(images: Path) -> int:
    """Make the contents of tmpfs mounts in ``images`` cheap to restore; how many of them are empty.

    CRIU has contents restored for the kinds of mounts that it knows by number (filesystems.c, fstypes), and mounts an
    "auto" one by the name in ``fsname`` (mount.c, mnt_fsname). Doing it twice changes nothing more. Raises
    ImageError for an archive that cannot be read.
    """
    modes = _modes(images)
    empty = set()
    for path in images.glob("tmpfs-dev-*.tar.gz.img"):
        if path.stat().st_size > _FRESH_AT_MOST:
            continue  # as large as a /dev/shm may be, and not empty
        content = path.read_bytes()
        device = int(path.name.removeprefix("tmpfs-dev-").removesuffix(".tar.gz.img"))
        if content != _EMPTY:
            try:
                archive = _archive(content)
                lighter = _EMPTY if _is_fresh(archive, modes.get(device)) else _PLAIN + archive
            except (OSError, EOFError, tarfile.TarError) as error:
                raise ImageError(f"{path}: {error}", hint="take a new checkpoint") from error
            if lighter != content:
                path.write_bytes(lighter)
            content = lighter
        if content == _EMPTY:
            empty.add(device)
    _mount_only(images, empty)
    return len(empty)


def _mount_only(images: Path, devices: Container[int]) -> None:
    """Let CRIU only mount the tmpfs of these device numbers."""
    for path in images.glob("mountpoints-*.img"):
        mounts = read_image(path)
        changed = [each for each in mounts if each.fstype == mnt_pb2.TMPFS and each.root_dev in devices]
        for mount in changed:
            mount.fstype, mount.fsname = mnt_pb2.AUTO, "tmpfs"
        if changed:
            write_image(path, mounts)


def _archive(content: bytes) -> bytes:
    return content.removeprefix(_PLAIN) if content.startswith(_PLAIN) else gzip.decompress(content)


def _modes(images: Path) -> dict[int, int]:
    """The mode that the top of a fresh mount gets, by device number as the images' names have it."""
    found = {}
    for path in images.glob("mountpoints-*.img"):
        for mount in read_image(path):
            given = re.search(r"(?:^|,)mode=([0-7]+)", mount.options)
            found[mount.root_dev] = int(given[1], 8) if given else _DEFAULT_MODE
    return found


def _is_fresh(archive: bytes, mode: int | None) -> bool:
    """Whether a mount of its own would look like this: nothing in it, and its top as mounted by root."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as members:
        entries = [(each.name, each.isdir(), each.uid, each.gid, each.mode) for each in members]
    return entries == [(".", True, 0, 0, mode)]
