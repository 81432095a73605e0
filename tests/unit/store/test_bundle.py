"""Bundles: what goes in comes out, and nothing ever lands outside."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from relume.errors import StoreError, Untrusted
from relume.store.bundle import pack_small, pack_tree, unpack_small, unpack_tree

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mknod needs root")


def round_trip(source: Path, target: Path) -> None:
    out = io.BytesIO()
    pack_tree(source, out)
    out.seek(0)
    target.mkdir()
    unpack_tree(out, target, "test")


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "dir").mkdir(mode=0o751)
    file = source / "dir" / "file with spaces é"
    file.write_bytes(b"content")
    file.chmod(0o4755)
    os.utime(file, ns=(1_600_000_000_123_456_789, 1_600_000_000_123_456_789))
    os.link(file, source / "dir" / "second-name")
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "pipe")
    with (source / "sparse").open("wb") as sparse:
        sparse.truncate(50 << 20)
    os.utime(source / "dir", ns=(5, 7_000_000_001))
    round_trip(source, tmp_path / "target")
    target = tmp_path / "target"
    copy = target / "dir" / file.name
    assert copy.read_bytes() == b"content"
    assert copy.stat().st_mode == file.stat().st_mode
    assert copy.stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert copy.stat().st_ino == (target / "dir" / "second-name").stat().st_ino
    assert (target / "link").readlink() == Path("/etc/passwd")
    assert stat.S_ISFIFO((target / "pipe").stat().st_mode)
    assert (target / "sparse").stat().st_size == 50 << 20
    assert (target / "sparse").stat().st_blocks < 1000
    assert (target / "dir").stat().st_mtime_ns == 7_000_000_001
    assert (target / "empty").is_dir()


@needs_root
def test_whiteouts_sockets_owners_and_attributes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.mknod(source / "deleted", stat.S_IFCHR | 0o600, 0)
    os.mknod(source / "socket", stat.S_IFSOCK | 0o755)
    (source / "opaque").mkdir()
    os.setxattr(source / "opaque", "trusted.overlay.opaque", b"y")
    (source / "owned").write_text("x")
    os.chown(source / "owned", 1234, 5678)
    os.setxattr(source / "owned", "user.binary", b"\0\xff\n=\x80 \x00")
    round_trip(source, tmp_path / "target")
    target = tmp_path / "target"
    whiteout = (target / "deleted").lstat()
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    assert stat.S_ISSOCK((target / "socket").lstat().st_mode)
    assert os.getxattr(target / "opaque", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(target / "owned", "user.binary") == b"\0\xff\n=\x80 \x00"
    assert ((target / "owned").stat().st_uid, (target / "owned").stat().st_gid) == (1234, 5678)


@needs_root
def test_a_device_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    os.mknod(tmp_path / "source" / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    with pytest.raises(StoreError, match="device"):
        pack_tree(tmp_path / "source", io.BytesIO())


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **headers: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, headers
    return info


@pytest.mark.parametrize(
    "evil",
    [
        [entry("../outside")],
        [entry("/tmp/absolute-outside")],
        [entry("a/../../outside")],
        [entry("door", tarfile.SYMTYPE, "/tmp"), entry("door/outside")],
        [entry("door", tarfile.SYMTYPE, ".."), entry("door/outside", tarfile.DIRTYPE)],
        [entry("hard", tarfile.LNKTYPE, "../secret")],
        [entry("hard", tarfile.LNKTYPE, "/etc/passwd")],
        [entry("door", tarfile.SYMTYPE, ".."), entry("hard", tarfile.LNKTYPE, "door/secret")],
        [entry("door", tarfile.SYMTYPE, "../secret"), entry("door")],
        [entry("disk", tarfile.BLKTYPE)],
        [entry("tty", tarfile.CHRTYPE)],
        [entry("odd", **{"RELUME.kind": "rootkit"})],
        [entry("capable", **{"SCHILY.xattr.security.capability": "x"})],
        [entry("twice"), entry("twice")],
        [entry("nowhere/file")],
        [entry("file"), entry("file/below")],
        [entry("")],
    ],
    ids=lambda infos: "+".join(info.name or "empty" for info in infos),
)
def test_nothing_lands_outside(tmp_path: Path, evil: list[tarfile.TarInfo]) -> None:
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info in evil:
            tar.addfile(info)
    out.seek(0)
    (tmp_path / "target").mkdir()
    with pytest.raises(Untrusted):
        unpack_tree(out, tmp_path / "target", "test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "target"]
    assert secret.read_text() == "untouched"
    assert secret.stat().st_nlink == 1


def test_small_files(tmp_path: Path) -> None:
    images = tmp_path / "from"
    images.mkdir()
    (images / "core-1.img").write_bytes(b"core")
    (images / "pages-1.img").write_bytes(b"memory")
    (tmp_path / "checkpoint.json").write_text("{}")
    packed = pack_small(images, [tmp_path / "checkpoint.json"])
    (tmp_path / "to").mkdir()
    unpack_small(packed, tmp_path / "to", "test")
    found = {
        str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*") if path.is_file()
    }
    assert found == {"images/core-1.img", "checkpoint.json"}
    assert (tmp_path / "to" / "images" / "core-1.img").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "name", ["../x", "/x", "other/x", "images/../x", "images/pages-1.img", "images/a/b", "images/.."]
)
def test_small_files_are_plain(tmp_path: Path, name: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(entry(name))
    with pytest.raises(Untrusted):
        unpack_small(out.getvalue(), tmp_path, "test")


@pytest.mark.parametrize(
    "unpack",
    [lambda data, to: unpack_small(data, to, "x"), lambda data, to: unpack_tree(io.BytesIO(data), to, "x")],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, unpack: Callable[[bytes, Path], None]) -> None:
    with pytest.raises(Untrusted):
        unpack(b"no tar at all" * 100, tmp_path)
