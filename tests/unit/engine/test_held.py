"""What this very process holds, and where a copy of it goes. Owners and overlay: tests/e2e/engine."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from relume.engine import held, preflight
from relume.engine._held_finder import Finder, Held, mapped_shared, sqlite_warnings
from relume.engine._held_tree import DEEPEST, Abandoned, Copier, Tree
from relume.errors import Unsupported, Untrusted
from relume.linux import proc
from relume.linux.files import remove_tree


def found(how: str, path: Path) -> list[Held]:
    return [
        one for one in Finder(Path("/")).find([os.getpid()]) if one.how == how and f"/{one.path}" == str(path)
    ]


def test_open_files_and_their_state(tmp_path: Path) -> None:
    with (
        (tmp_path / "open").open("w") as plain,
        (tmp_path / "gone").open("w"),
        (tmp_path / "db-shm").open("w") as shm,
    ):
        (tmp_path / "gone").unlink()
        fcntl.lockf(shm, fcntl.LOCK_EX)
        (one,) = found("open", tmp_path / "open")
        assert (one.pid, one.deleted, one.locked) == (os.getpid(), False, False)
        assert found("open", tmp_path / "gone")[0].deleted
        assert found("open", tmp_path / "db-shm")[0].locked
        assert not plain.closed
    assert found("open", tmp_path / "open") == []


def test_a_name_that_really_ends_in_deleted(tmp_path: Path) -> None:
    with (tmp_path / "odd (deleted)").open("w"):
        (one,) = found("open", tmp_path / "odd (deleted)")
        assert not one.deleted


def test_where_a_process_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found("working directory", tmp_path)
    assert found("executable", Path(sys.executable).resolve())


def test_processes_that_are_gone_or_going_hold_nothing() -> None:
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert Finder(Path("/")).find([zombie.pid]) == []
    zombie.wait()
    assert Finder(Path("/")).find([zombie.pid]) == []


@pytest.mark.parametrize(
    ("shm", "warned"),
    [
        ({"how": "open", "locked": True}, True),
        ({"how": "open", "locked": False}, False),  # the database is not in WAL mode any more
    ],
)
def test_sqlite(shm: dict[str, bool], warned: bool) -> None:
    mapped = Held("data/x.db-shm", 4, "app", "mapped")
    opened = Held("data/x.db-shm", 4, "app", **shm)  # type: ignore[arg-type]
    warnings = sqlite_warnings([mapped, opened])
    assert bool(warnings) is warned
    assert all("app (pid 4) has the SQLite database /data/x.db open" in each for each in warnings)
    assert sqlite_warnings([opened]) == []


def test_the_limit_names_file_and_way_out() -> None:
    one = Held("models/big.bin", 9, "server", "mapped")
    assert held.too_large(one, 10, 10) is None
    culprit = held.too_large(one, 11, 10)
    assert culprit is not None
    assert str(culprit) == (
        "server (pid 9) holds /models/big.bin (mapped), 11 bytes in the writable layer; the limit is 10 bytes"
    )
    assert 'filesystem = "all"' in culprit.hint


def copied(source: Path, target: Path, *paths: str) -> None:
    tree = Tree(source)
    copier = Copier(tree, target, lambda owner: owner)
    try:
        for path in paths:
            status = tree.stat(path)
            assert status is not None
            copier.entry(path, status)
        copier.finish()
    finally:
        copier.close()
        tree.close()


def test_directories_above_come_along_as_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "a/b").mkdir(parents=True)
    target.mkdir()
    (source / "a/b/file").write_bytes(b"data")
    (source / "a/b/other").write_bytes(b"not asked for")
    (source / "a").chmod(0o711)
    os.utime(source / "a", ns=(10**18, 10**18 + 1))
    copied(source, target, "a/b/file")
    assert (target / "a/b/file").read_bytes() == b"data"
    assert not (target / "a/b/other").exists()
    assert (target / "a").stat().st_mode & 0o777 == 0o711
    assert (target / "a").stat().st_mtime_ns == 10**18 + 1


def test_what_is_mapped_and_not_written_back_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "table").write_bytes(bytes(1 << 20))
    with (source / "table").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[4096:4101] = b"dirty"
        copied(source, target, "table")
    assert (target / "table").read_bytes()[4096:4101] == b"dirty"


def test_no_path_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").touch()
    (tmp_path / "tree/link").symlink_to(tmp_path / "secret")
    tree = Tree(tmp_path / "tree")
    try:
        assert tree.stat("link/file") is None
        with pytest.raises(OSError):
            tree.directory("link")
        assert [path for path, _ in tree.walk()] == ["link"]
    finally:
        tree.close()


def test_what_was_left_behind(tmp_path: Path) -> None:
    upper, dest = tmp_path / "upper", tmp_path / "dest"
    (upper / "app/__pycache__").mkdir(parents=True)
    (upper / "data").mkdir()
    (dest / "data").mkdir(parents=True)
    (upper / "app/__pycache__/x.pyc").write_bytes(bytes(4096))
    (upper / "data/kept").write_bytes(b"x")
    (dest / "data/kept").write_bytes(b"x")
    for number in range(12):
        (upper / f"data/file{number:02}").write_bytes(bytes(4096))
    left = held.survey(upper, dest, id_base=upper.stat().st_uid)
    assert (left.count, left.bytes) == (13, 13 * 4096)
    assert (left.cache_count, left.cache_bytes) == (1, 4096)
    assert left.names == tuple(f"/data/file{number:02}" for number in range(10))
    assert 'filesystem = "all"' in left.hint
    shown = held.survey(upper, dest, id_base=upper.stat().st_uid, mounted={"/data/file00"})
    assert (shown.count, shown.names[0]) == (12, "/data/file01"), "a mount point is nobody's file"
    # what the runtime made, outside of the container's ids, is nobody's loss
    assert held.survey(upper, dest, id_base=upper.stat().st_uid + 1).count == 0


def test_a_walk_survives_what_goes_away(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    tree = Tree(tmp_path)
    try:
        seen = []
        for path, _ in tree.walk():
            seen.append(path)
            if path == "a/file":
                (tmp_path / "b/file").unlink()
            if path == "b":
                (tmp_path / "b").rmdir()
                (tmp_path / "b").symlink_to("/etc")
        assert seen == ["a", "a/file", "b", "c", "c/file"]
    finally:
        tree.close()


def test_what_nobody_holds_comes_along_when_it_is_named(tmp_path: Path) -> None:
    """Links that a hook made at the boot, in directories that are only there for them."""
    upper, dest = tmp_path / "upper", tmp_path / "dest"
    (upper / "usr/lib").mkdir(parents=True)
    (upper / "usr/lib/libcuda.so").symlink_to("libcuda.so.1")
    (upper / "usr/lib/other").write_text("not named")
    dest.mkdir()
    report = held.capture(
        [],
        upper=upper,
        rootfs=Path("/"),
        dest=dest,
        id_base=os.getuid(),
        limit_bytes=0,
        everything=False,
        also=["/usr/lib/libcuda.so", "/etc/ld.so.cache"],
    )
    assert [str(path.relative_to(dest)) for path in sorted(dest.rglob("*"))] == [
        "usr",
        "usr/lib",
        "usr/lib/libcuda.so",
    ]
    assert (dest / "usr/lib/libcuda.so").readlink() == Path("libcuda.so.1")
    assert report.files == 0


def test_only_names_that_are_missing_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at all of the layer is taken while the app stands still."""
    upper, index = tmp_path / "upper", tmp_path / "index"
    upper.mkdir()
    index.mkdir()
    (upper / "log").touch()
    os.link(upper / "log", index / "log")  # as overlay keeps one of what it has copied up
    os.setxattr(upper / "log", "trusted.overlay.origin", b"x")
    (upper / "new").touch()
    os.link(upper / "new", upper / "same")
    log, new, same = (Held(name, 1, "app", "open") for name in ("log", "new", "same"))
    tree = Tree(upper)
    try:
        assert set(held._names(tree, [log, new], 1 << 30, ())) == {"", "log", "new", "same"}
        monkeypatch.setattr(Tree, "walk", lambda *_: pytest.fail("the layer was walked"))
        assert set(held._names(tree, [log], 1 << 30, ())) == {"", "log"}
        assert set(held._names(tree, [new, same], 1 << 30, ())) == {"", "new", "same"}
    finally:
        tree.close()


def test_what_is_mapped_shared(tmp_path: Path) -> None:
    for name in ("shared", "private", "both", "new\nline"):
        (tmp_path / name).write_bytes(bytes(4096))
    maps = []
    for name, flags in (
        ("shared", mmap.MAP_SHARED),
        ("private", mmap.MAP_PRIVATE),
        ("both", mmap.MAP_PRIVATE),
        ("both", mmap.MAP_SHARED),
        ("new\nline", mmap.MAP_SHARED),
    ):
        with (tmp_path / name).open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ))
    try:
        found_now = mapped_shared([os.getpid(), 2**22 + 1])  # the second is no process
    finally:
        for each in maps:
            each.close()
    inside = str(tmp_path).strip("/")
    assert {name for name in found_now if name.startswith(inside)} == {
        f"{inside}/{name}" for name in ("shared", "both", "new\nline")
    }


def saved_whole(
    upper: Path,
    dest: Path,
    monkeypatch: pytest.MonkeyPatch,
    *all_held: Held,
    shared: set[str],
    limit: int = 1 << 30,
) -> held.HeldReport:
    """A layer saved whole while ``all_held`` are held."""
    monkeypatch.setattr(Finder, "find", lambda self, pids: list(all_held))
    monkeypatch.setattr(held, "mapped_shared", lambda pids: shared)
    dest.mkdir()
    return held.capture(
        [], upper=upper, rootfs=Path("/"), dest=dest, id_base=os.getuid(), limit_bytes=limit, everything=True
    )


def names_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_of_a_whole_layer_only_what_is_held_is_each_copys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under all its names; what lies beside it stays below, and is hidden by none of the directories above it."""
    upper, dest, own = tmp_path / "upper", tmp_path / "dest", tmp_path / "own"
    (upper / "data/deep").mkdir(parents=True)
    for name in ("data/db", "data/deep/log", "data/left", "weights", "program", "link_remap.3", "caf\udce9"):
        (upper / name).write_bytes(os.fsencode(name))
    os.link(upper / "data/db", upper / "same")
    os.link(upper / "link_remap.3", upper / "data/renamed")
    os.setxattr(upper / "data", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "data/deep", "trusted.overlay.redirect", b"/old")
    os.setxattr(upper / "data/deep", "user.note", b"kept")
    (upper / "data").chmod(0o711)
    report = saved_whole(
        upper,
        dest,
        monkeypatch,
        Held("data/db", 1, "app", "mapped"),
        Held("data/deep/log", 1, "app", "open"),
        Held("caf\udce9", 1, "app", "open"),
        Held("old", 1, "app", "open", deleted=True),  # now link_remap.3, for as long as the dump lasts
        Held("data", 1, "app", "working directory"),
        Held("weights", 1, "app", "mapped"),
        Held("program", 1, "app", "executable"),
        Held("usr/lib/libc.so", 1, "app", "mapped"),  # of the image
        shared={"data/db"},
    )
    assert names_below(dest) == names_below(upper)
    assert set(report.own_files) == {
        "data/db",
        "same",
        "data/deep/log",
        "link_remap.3",
        "data/renamed",
        "caf%E9",
    }
    json.loads(json.dumps(report.own_files).encode())
    assert report.warnings == ()

    own.mkdir()
    held.lay(dest, own, id_base=os.getuid(), only=report.own_files)
    files = {"data/db", "same", "data/deep/log", "link_remap.3", "data/renamed", "caf\udce9"}
    assert names_below(own) == {*files, "data", "data/deep"}
    assert (own / "same").samefile(own / "data/db") and (own / "data/renamed").samefile(own / "link_remap.3")
    assert (own / "caf\udce9").read_bytes() == b"caf\xe9"
    assert (own / "data").stat().st_mode & 0o777 == 0o711
    assert os.listxattr(own / "data") == [] and os.listxattr(own / "data/deep") == ["user.note"]
    assert os.getxattr(dest / "data", "trusted.overlay.opaque") == b"y", "below, it hides what the image has"


def test_of_a_whole_layer_what_is_too_large_for_every_start_stays_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper, dest = tmp_path / "upper", tmp_path / "dest"
    upper.mkdir()
    for name in ("mapped", "open"):
        (upper / name).write_bytes(bytes(8192))
    with (upper / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    report = saved_whole(
        upper,
        dest,
        monkeypatch,
        *(Held(name, 7, "app", "mapped") for name in ("mapped", "sparse")),
        Held("open", 7, "app", "open"),
        shared={"mapped", "sparse"},
        limit=4096,
    )
    assert report.own_files == ("sparse",)
    (warning,) = report.warnings
    assert warning.startswith("app (pid 7) has /mapped mapped, 8192 bytes")


@pytest.mark.parametrize("only", [[], ["gone", "file/below", "link", "directory"]])
def test_above_a_whole_layer_nothing_else_is_laid(tmp_path: Path, only: list[str]) -> None:
    """Neither where nothing was noted, as older revisions left it, nor what is no file."""
    (tmp_path / "dest/directory").mkdir(parents=True)
    (tmp_path / "dest/file").touch()
    (tmp_path / "dest/link").symlink_to("/etc/passwd")
    (tmp_path / "own").mkdir()
    held.lay(tmp_path / "dest", tmp_path / "own", id_base=os.getuid(), only=only)
    assert names_below(tmp_path / "own") == set()


@pytest.mark.parametrize("name", ["../etc/passwd", "a/%2e%2e/b", "/etc/passwd", "a//b", "."])
def test_a_name_that_leads_out_of_the_layer_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "dest").mkdir()
    with pytest.raises(Untrusted, match="no path of a held file"):
        held.lay(tmp_path / "dest", tmp_path / "own", id_base=os.getuid(), only=[name])


def test_a_copy_that_nobody_wants_any_more_ends(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/large").write_bytes(bytes(200 << 20))
    (tmp_path / "copy").mkdir()
    asked = []

    def abandoned() -> bool:
        asked.append(True)
        return len(asked) == 3

    with pytest.raises(Abandoned):
        held.capture(
            [],
            upper=tmp_path / "layer",
            rootfs=Path("/"),
            dest=tmp_path / "copy",
            id_base=0,
            limit_bytes=0,
            everything=True,
            abandoned=abandoned,
        )
    assert 0 < (tmp_path / "copy/large").stat().st_blocks * 512 < 200 << 20


def test_a_directory_renamed_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a program does that makes a directory under another name first."""
    upper, dest = tmp_path / "upper", tmp_path / "dest"
    (upper / "part/inner").mkdir(parents=True)
    (upper / "kept").mkdir()
    dest.mkdir()
    directory = Copier.directory

    def renamed_first(copier: Copier, path: str) -> bool:
        if (upper / "part").exists():
            (upper / "part").rename(upper / "whole")
        return directory(copier, path)

    monkeypatch.setattr(Copier, "directory", renamed_first)
    held.add_directories(upper, dest, id_base=os.getuid())
    assert [path.name for path in dest.iterdir()] == ["kept"]


def test_sockets_with_newlines_in_their_names(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        abstract.bind("\0a\nb /c\n")
        named.bind(str(tmp_path / "a\nb"))
        (one,) = found("bound socket", tmp_path / "a\nb")
        assert not one.deleted


def test_a_connection_closed_under_our_eyes_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "socket"))
    accepted, _ = server.accept()
    sockets = proc.unix_sockets

    def then_closed(pid: int) -> list[proc.UnixSocket]:
        found = sockets(pid)
        accepted.close()
        return [each for each in found if each.inode == inode]

    inode = os.fstat(accepted.fileno()).st_ino
    monkeypatch.setattr(proc, "unix_sockets", then_closed)
    try:
        assert found("bound socket", tmp_path / "socket") == []
        assert accepted.fileno() == -1
    finally:
        client.close()
        server.close()


def test_processes_with_another_root(tmp_path: Path) -> None:
    """chroot(2) into a plain directory: nothing is mounted at their root."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.chroot({str(tmp_path)!r}); print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdin is not None
    with child:
        child.stdout.readline()
        assert proc.root_mount(child.pid).mnt_id == mount_of(tmp_path)
        held_there = Finder(Path("/")).find([child.pid])
        assert {"root directory"} <= {one.how for one in held_there}
        (culprit,) = preflight.examine([child.pid], rootfs=Path("/"))
        assert "first process and has changed its root" in culprit.what
        child.stdin.close()


def mount_of(path: Path) -> int:
    descriptor = os.open(path, os.O_PATH)
    try:
        return proc.mount_id(proc.fdinfo(os.getpid(), descriptor))
    finally:
        os.close(descriptor)


def test_a_path_too_long_to_be_written_out_is_named(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[here])
    assert child.stdin is not None
    with child:
        assert (here, proc.TOO_LONG) in proc.descriptors(child.pid)
        Finder(Path("/")).find([child.pid])
        culprits = preflight.examine([child.pid], rootfs=Path("/"))
        assert any("more than 4096 bytes" in culprit.what for culprit in culprits)
        child.stdin.close()
    os.close(here)
    remove_tree(tmp_path)


def test_a_zombie_has_neither_memory_nor_mounts() -> None:
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert preflight.estimate([zombie.pid]).total == 0
    with pytest.raises(ProcessLookupError):
        proc.mounts(zombie.pid)
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(1 << 16))
        file.flush()
        assert preflight.estimate([zombie.pid, os.getpid()]).tmpfs >= 1 << 16, "by the next process"
    zombie.wait()


def deep(root: Path, levels: int) -> None:
    here = os.open(root, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def test_a_tree_deeper_than_anything_sane_is_looked_into_so_far(tmp_path: Path) -> None:
    upper, dest = tmp_path / "upper", tmp_path / "dest"
    upper.mkdir()
    dest.mkdir()
    deep(upper, 3000)
    (upper / "file").touch()
    mine = os.getuid()
    held.add_directories(upper, dest, id_base=mine)
    assert len(list(dest.rglob("*"))) == DEEPEST + 1
    assert held.survey(upper, dest, id_base=mine).names == ("/file",)
    remove_tree(upper)


def test_a_held_file_that_is_too_deep_is_refused_by_name(tmp_path: Path) -> None:
    one = Held("/".join("d" * (DEEPEST + 2)), 7, "digger", "working directory")
    with pytest.raises(Unsupported, match=f"the limit is {DEEPEST}") as refused:
        held._names(Tree(tmp_path), [one], 1 << 30, ())
    assert refused.value.details["culprits"][0]["pid"] == 7
    assert [culprit.pid for culprit in preflight._not_to_be_held([one], tmp_path, 1 << 30)] == [7]
