"""Laying a tree keeps what it is, and never follows a name out of it. Root: owners, whiteouts, overlay marks."""

from __future__ import annotations

import os
import stat
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
