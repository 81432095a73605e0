"""Laying a tree keeps what it is, and never follows a name out of it. Root: owners, whiteouts, overlay marks."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.engine import held
from relume.errors import Untrusted

from .conftest import ID_BASE


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What an app may leave in its layer, the malicious included."""
    root = tmp_path / "tree"
    (root / "dir/deep").mkdir(parents=True)
    (root / "outside").symlink_to("/etc")
    (root / "shadow").symlink_to("/etc/shadow")
    (root / "dir/plain").write_bytes(b"plain")
    os.link(root / "dir/plain", root / "dir/deep/other")
    with (root / "sparse").open("wb") as sparse:
        for place in (0, 10 << 20, (1 << 40) - 4096):
            sparse.seek(place)
            sparse.write(b"x" * 4096)
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o666)
    os.mknod(root / "whiteout", stat.S_IFCHR, 0)
    os.mknod(root / "disk", stat.S_IFBLK | 0o666, os.makedev(8, 0))
    os.mknod(root / "memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))
    (root / "suid").write_bytes(b"")
    os.chown(root / "suid", 33, 44)
    (root / "suid").chmod(0o6755)
    os.setxattr(root / "dir", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "dir", "trusted.overlay.origin", b"\0\xfb\x1d")
    os.setxattr(root / "dir/plain", "user.note", b"kept")
    os.setxattr(
        root / "suid", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000")
    )
    os.utime(root / "dir/plain", ns=(10**18 + 1, 10**18 + 2))
    os.utime(root / "outside", ns=(10**18 + 3, 10**18 + 4), follow_symlinks=False)
    os.chown(root / "dir", 5, 6)
    (root / "dir").chmod(0o1770)
    os.utime(root / "dir", ns=(10**18 + 5, 10**18 + 6))
    return root


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    made = tmp_path / "upper"
    made.mkdir()
    return made


def test_everything_is_kept(tree: Path, upper: Path) -> None:
    etc = Path("/etc").stat()
    held.lay(tree, upper, id_base=ID_BASE)
    assert Path("/etc").stat() == etc

    assert {str(path.relative_to(upper)) for path in upper.rglob("*")} == {
        str(path.relative_to(tree)) for path in tree.rglob("*") if path.name not in ("disk", "memory")
    }
    plain = (upper / "dir/plain").stat()
    assert (plain.st_mtime_ns, plain.st_nlink) == (10**18 + 2, 2)
    assert os.getxattr(upper / "dir/plain", "user.note") == b"kept"
    assert (upper / "dir/deep/other").samefile(upper / "dir/plain")
    outside = (upper / "outside").lstat()
    assert (outside.st_uid, outside.st_mtime_ns) == (ID_BASE, 10**18 + 4)
    assert (upper / "outside").readlink() == Path("/etc")
    sparse = (upper / "sparse").stat()
    assert (sparse.st_size, sparse.st_blocks * 512) == (1 << 40, (tree / "sparse").stat().st_blocks * 512)
    with (upper / "sparse").open("rb") as data:
        data.seek(10 << 20)
        assert data.read(4097) == b"x" * 4096 + b"\0"
    suid = (upper / "suid").stat()
    assert (suid.st_uid, suid.st_gid, stat.S_IMODE(suid.st_mode)) == (ID_BASE + 33, ID_BASE + 44, 0o6755)
    assert "security.capability" not in os.listxattr(upper / "suid")
    folder = (upper / "dir").stat()
    assert (folder.st_uid, folder.st_gid, stat.S_IMODE(folder.st_mode)) == (ID_BASE + 5, ID_BASE + 6, 0o1770)
    assert folder.st_mtime_ns == 10**18 + 6
    assert os.listxattr(upper / "dir") == ["trusted.overlay.opaque"]
    assert upper.stat().st_uid == ID_BASE
    assert stat.S_ISFIFO((upper / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((upper / "socket").stat().st_mode)
    whiteout = (upper / "whiteout").stat()
    assert stat.S_ISCHR(whiteout.st_mode) and whiteout.st_rdev == 0


def test_an_acl_moves_with_its_owners(tree: Path, upper: Path) -> None:
    # version 2: user::rw-, user:33:r--, group::r--, mask::r--, other::---
    def acl(owner: int) -> bytes:
        entries = ((1, 6, -1), (2, 4, owner), (4, 4, -1), (16, 4, -1), (32, 0, -1))
        return b"\2\0\0\0" + b"".join(
            tag.to_bytes(2, "little") + mode.to_bytes(2, "little") + (who & 0xFFFFFFFF).to_bytes(4, "little")
            for tag, mode, who in entries
        )

    os.setxattr(tree / "dir/plain", "system.posix_acl_access", acl(33))
    held.lay(tree, upper, id_base=ID_BASE)
    assert os.getxattr(upper / "dir/plain", "system.posix_acl_access") == acl(ID_BASE + 33)


def test_an_owner_no_container_has_is_refused(tree: Path, upper: Path) -> None:
    os.chown(tree / "dir/plain", 65536, 0)
    with pytest.raises(Untrusted, match="65536"):
        held.lay(tree, upper, id_base=ID_BASE)


def test_a_link_that_took_a_directorys_place_is_not_followed(tree: Path, upper: Path) -> None:
    (upper / "dir").symlink_to("/etc")
    with pytest.raises(OSError):
        held.lay(tree, upper, id_base=ID_BASE)
    assert not Path("/etc/deep").exists()


def test_a_deep_and_wide_tree_needs_few_descriptors(tmp_path: Path, upper: Path) -> None:
    root = tmp_path / "wide"
    for number in range(600):
        (root / f"{number}/a/b").mkdir(parents=True)
        (root / f"{number}/a/b/file").touch()
    before = len(list(Path("/proc/self/fd").iterdir()))
    held.lay(root, upper, id_base=ID_BASE)
    assert len(list(upper.rglob("file"))) == 600
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    left = held.survey(root, upper, id_base=0)
    assert left.count == 0


@pytest.fixture
def merged(tmp_path: Path, upper: Path) -> Iterator[Path]:
    """An overlay with ``upper`` above an image that has some directories."""
    for name in ("lower/run", "lower/opt/old/inner", "lower/etc", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    for path in (tmp_path / "lower").rglob("*"):
        os.chown(path, ID_BASE, ID_BASE)
    options = f"lowerdir={tmp_path}/lower,upperdir={upper},workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "merged"], check=True)
    yield tmp_path / "merged"
    subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_what_a_whole_layer_gives_a_copy_of_its_own_is_one_file(tmp_path: Path, upper: Path) -> None:
    """For a mapping made before, for whoever writes later, and by all its names; what lies beside it is there too."""
    for name in ("image/data", "layer/data", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "image/data/hidden").touch()
    os.setxattr(tmp_path / "layer/data", "trusted.overlay.opaque", b"y")
    for name in ("data/table", "data/left"):
        (tmp_path / "layer" / name).write_bytes(b"before")
    os.link(tmp_path / "layer/data/table", tmp_path / "layer/same")
    held.lay(tmp_path / "layer", upper, id_base=ID_BASE, only=["data/table", "same"])
    merged = tmp_path / "merged"
    lower = f"{tmp_path}/layer:{tmp_path}/image"
    options = f"index=off,lowerdir={lower},upperdir={upper},workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
    try:
        with (
            (merged / "data/table").open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as table,
        ):
            with (merged / "data/table").open("r+b") as another:
                another.write(b"later!")
            assert table[:] == b"later!"
        assert (merged / "same").read_bytes() == b"later!"
        assert {path.name for path in (merged / "data").iterdir()} == {"table", "left"}
    finally:
        subprocess.run(["umount", merged], check=True)
    assert (tmp_path / "layer/same").read_bytes() == b"before"


def made_by_app(path: Path, mode: int = 0o755) -> None:
    path.mkdir()
    path.chmod(mode)
    os.chown(path, ID_BASE + 33, ID_BASE + 44)


def test_directories_that_the_app_made_come_along(tmp_path: Path, upper: Path, merged: Path) -> None:
    for name, mode in {"run/sshd": 0o711, "run/sshd/inner": 0o755, "srv": 0o700, "etc/app": 0o755}.items():
        made_by_app(merged / name, mode)
    (merged / "run/sshd/pid").touch()
    (merged / "etc").chmod(0o700)  # changed, not made
    (merged / "runtime").mkdir()  # by root outside
    made_by_app(merged / "mounted")
    (merged / "opt/old/inner").rmdir()
    (merged / "opt/old").rmdir()
    made_by_app(merged / "opt/old")  # in the place of another
    made_by_app(merged / "opt/old/within")
    dest = tmp_path / "held"
    (dest / "srv").mkdir(parents=True)
    (dest / "srv").chmod(0o755)
    held.add_directories(upper, dest, id_base=ID_BASE, mounted={"/mounted"})
    found = {
        str(path.relative_to(dest)): (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid)
        for path in dest.rglob("*")
    }
    assert found == {
        "run": (0o755, 0),
        "run/sshd": (0o711, 33),
        "run/sshd/inner": (0o755, 33),
        "srv": (0o755, 0),  # was there: as it was
        "etc": (0o700, 0),  # above what was made
        "etc/app": (0o755, 33),
        "opt": (0o755, 0),
        "opt/old": (0o755, 33),
        "opt/old/within": (0o755, 33),
    }
    assert os.getxattr(dest / "opt/old", "trusted.overlay.opaque") == b"y", "it hides the old one"


def test_no_more_directories_come_along_than_a_start_can_make(
    tmp_path: Path, upper: Path, merged: Path
) -> None:
    for number in range(held._DIRECTORIES_ADDED):
        made_by_app(merged / f"{number}")
        made_by_app(merged / f"{number}/below")
    dest = tmp_path / "held"
    dest.mkdir()
    held.add_directories(upper, dest, id_base=ID_BASE)
    assert len(list(dest.iterdir())) == held._DIRECTORIES_ADDED == len(list(dest.rglob("*")))
