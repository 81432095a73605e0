"""The cheap form of tmpfs contents; the script itself meets real mounts in tests/e2e/engine/test_engine_tmpfs.py."""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from relume.engine import tmpfs
from relume.errors import ImageError
from relume.images import read_image, write_image
from relume.images.proto import mnt_pb2

EMPTY, PLAIN = b"relume: an empty tmpfs\n", b"relume: a tar archive follows\n"


def archive(*names: str, mode: int = 0o755, uid: int = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name in (".", *names):
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE
            entry.mode, entry.uid = mode, uid
            made.addfile(entry)
    return buffer.getvalue()


def images(place: Path, content: bytes, options: str = "mode=755,inode64") -> Path:
    mount = mnt_pb2.mnt_entry(
        fstype=mnt_pb2.TMPFS,
        mnt_id=1,
        root_dev=77,
        parent_mnt_id=0,
        flags=0,
        root="/",
        mountpoint="./dev",
        source="",
        options=options,
    )
    write_image(place / "mountpoints-9.img", [mount], kind="MNTS")
    stored = place / "tmpfs-dev-77.tar.gz.img"
    stored.write_bytes(content)
    return stored


@pytest.mark.parametrize("packed", [gzip.compress, lambda content: PLAIN + content])
def test_a_fresh_mount_is_one_line(tmp_path: Path, packed) -> None:  # type: ignore[no-untyped-def]
    stored = images(tmp_path, packed(archive()))
    assert tmpfs.lighten(tmp_path) == 1
    assert stored.read_bytes() == EMPTY
    assert tmpfs.lighten(tmp_path) == 1
    (mount,) = read_image(tmp_path / "mountpoints-9.img")
    assert (mount.fstype, mount.fsname, mount.options) == (mnt_pb2.AUTO, "tmpfs", "mode=755,inode64")


@pytest.mark.parametrize(
    "content",
    [archive("./name"), archive(mode=0o700), archive(uid=33)],
    ids=["has content", "another mode", "another owner"],
)
def test_anything_else_is_kept(tmp_path: Path, content: bytes) -> None:
    stored = images(tmp_path, gzip.compress(content))
    assert tmpfs.lighten(tmp_path) == 0
    assert stored.read_bytes() == PLAIN + content
    (mount,) = read_image(tmp_path / "mountpoints-9.img")
    assert (mount.fstype, mount.fsname) == (mnt_pb2.TMPFS, "")


def test_a_large_one_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = images(tmp_path, PLAIN + archive() + bytes(1 << 20))
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: pytest.fail("read") if path == stored else read(path)
    )
    assert tmpfs.lighten(tmp_path) == 0
    assert stored.stat().st_size > 1 << 20


def test_without_a_mode_it_is_the_file_system_s_own(tmp_path: Path) -> None:
    images(tmp_path, gzip.compress(archive(mode=0o1777)), options="ro,size=1024k")
    assert tmpfs.lighten(tmp_path) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"neither", gzip.compress(archive())[:-9], PLAIN + b"no archive"],
    ids=["empty", "neither", "cut short", "no archive"],
)
def test_damage_is_named(tmp_path: Path, content: bytes) -> None:
    images(tmp_path, content)
    with pytest.raises(ImageError, match="tmpfs-dev-77"):
        tmpfs.lighten(tmp_path)


def test_the_script_reads_every_form(tmp_path: Path) -> None:
    tmpfs.install(tmp_path / "bin")
    environment = tmpfs.environment({"PATH": "/usr/bin:/bin"}, tmp_path / "bin")
    for number, (content, made) in enumerate(
        ((EMPTY, False), (PLAIN + archive("./a name"), True), (gzip.compress(archive("./a name")), True))
    ):
        target, stored = tmp_path / f"to {number}", tmp_path / "stored"
        target.mkdir()
        stored.write_bytes(content)
        with stored.open("rb") as file:
            words = [
                "tar",
                "--extract",
                "--gzip",
                "--no-unquote",
                "--no-wildcards",
                "--directory",
                str(target),
            ]
            subprocess.run(words, stdin=file, env=environment, check=True)
        assert (target / "a name").is_dir() is made


def test_the_script_writes_what_lies_there(tmp_path: Path) -> None:
    tmpfs.install(tmp_path / "bin")
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / ".hidden").touch()
    with (tmp_path / "stored").open("wb") as out:
        subprocess.run(
            [
                "sh",
                "-c",
                'exec tar --create --gzip --directory /proc/self/fd/0 . <"$0"',
                str(tmp_path / "from"),
            ],
            stdout=out,
            env=tmpfs.environment({"PATH": "/usr/bin:/bin"}, tmp_path / "bin"),
            check=True,
        )
    written = (tmp_path / "stored").read_bytes()
    assert written.startswith(PLAIN)
    with tarfile.open(fileobj=io.BytesIO(written.removeprefix(PLAIN))) as members:
        assert members.getnames() == [".", "./.hidden"]
