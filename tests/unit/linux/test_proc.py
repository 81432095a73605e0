"""Reading /proc, on this process itself and on texts in the kernel's form."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from relume.linux import proc

ME = os.getpid()


def test_names_with_odd_letters(tmp_path: Path) -> None:
    odd = tmp_path / "a b\nc\\d (deleted)"
    odd.write_bytes(b"x" * 4096)
    with odd.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
        assert mapped[0] == ord("x")
        assert (file.fileno(), str(odd)) in set(proc.descriptors(ME))
        (mapping,) = [each for each in proc.mappings(ME) if each.path == str(odd)]
        assert mapping.shared and mapping.end - mapping.start == 4096
        assert mapping.inode == odd.stat().st_ino
        assert Path(f"/proc/self/map_files/{proc.mapped(ME)[str(odd)]}").samefile(odd)


def test_a_deleted_name_is_marked(tmp_path: Path) -> None:
    with (tmp_path / "gone").open("w") as file:
        (tmp_path / "gone").unlink()
        assert dict(proc.descriptors(ME))[file.fileno()] == f"{tmp_path}/gone{proc.DELETED}"


def test_the_mount_of_a_file() -> None:
    descriptor = os.open("/", os.O_PATH)
    try:
        assert proc.mount_id(proc.fdinfo(ME, descriptor)) == proc.root_mount(ME).mnt_id
    finally:
        os.close(descriptor)
    assert proc.mount_id("pos:\t0\nflags:\t02\n") == -1


def test_mount_points_are_unescaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_bytes(b"36 35 98:0 /a\\040b /mnt/c\\134\\040d rw,noatime master:1 - ext3 /dev/root rw\n")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *rest: real(table, *rest))
    assert proc.mounts(1) == [proc.Mount(36, 35, "98:0", "/a b", "/mnt/c\\ d", "ext3")]


def test_status_and_namespaces() -> None:
    status = proc.status(ME)
    assert status.pids[0] == ME and proc.tracers(ME) == set()
    assert status.name == Path("/proc/self/comm").read_text().rstrip("\n")
    assert f"net:[{proc.namespace(ME, 'net')}]" == str(Path("/proc/self/ns/net").readlink())


def test_unix_sockets(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "with space"))
        listener.listen()
        client.connect(str(tmp_path / "with space"))
        sockets = {each.inode: each for each in proc.unix_sockets(ME)}
        bound = sockets[os.fstat(listener.fileno()).st_ino]
        assert (bound.path, bound.listening, bound.connected) == (str(tmp_path / "with space"), True, False)
        other = sockets[os.fstat(client.fileno()).st_ino]
        assert (other.path, other.listening, other.connected) == ("", False, True)


ENTRY = "0000000000000000: 00000002 00000000 00010000 0001 01"


@pytest.mark.parametrize(
    "name",
    [
        "\0line\nbreak",
        "\0\nfirst",
        "\0last\n\n",
        "\0a\n\nb c\n: 1",
        f"\0{ENTRY} -1 x\ny",
        b"\0\n\xff\x80",
        b"\0\n" * 50,
        "{}/line\nbreak",
    ],
)
def test_unix_sockets_with_newlines_in_their_names(name: str | bytes, tmp_path: Path) -> None:
    """The kernel writes names as they are, but for a zero byte, in whose place it has an @."""
    name = name.format(tmp_path) if isinstance(name, str) else name
    with socket.socket(socket.AF_UNIX) as odd, socket.socket(socket.AF_UNIX) as plain:
        odd.bind(name)
        odd.listen()
        plain.bind(str(tmp_path / "plain"))
        sockets = {each.inode: each for each in proc.unix_sockets(ME)}
        found = sockets[os.fstat(odd.fileno()).st_ino]
        assert (found.path, found.listening) == (os.fsdecode(name).replace("\0", "@"), True)
        assert sockets[os.fstat(plain.fileno()).st_ino].path == str(tmp_path / "plain")


def test_a_name_that_looks_like_an_entry_is_read_as_one() -> None:
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(f"\0a\n{ENTRY}     1 /etc/b")
        sockets = {each.inode: each for each in proc.unix_sockets(ME)}
        assert sockets[os.fstat(odd.fileno()).st_ino].path == "@a"
        assert sockets[1].path == "/etc/b"


def test_threads_that_go_on() -> None:
    started, done = threading.Event(), threading.Event()
    found: list[int] = []

    def thread() -> None:
        found.append(threading.get_native_id())
        started.set()
        done.wait()

    one = threading.Thread(target=thread, daemon=True)
    one.start()
    started.wait()
    assert {ME, *found} <= set(proc.threads_going_on(ME))
    done.set()
    one.join()
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    assert proc.threads_going_on(zombie.pid) == []
    assert proc.parent(zombie.pid) == ME
    zombie.wait()


@pytest.mark.parametrize(
    ("lines", "goes_on"),
    [
        ("State:\tS (sleeping)\nVmSize:\t 9 kB\nSigPnd:\t0000000000000000\n", True),
        ("State:\tS (sleeping)\nVmSize:\t 9 kB\nSigPnd:\t0000000000000200\n", True),
        ("State:\tD (disk sleep)\nVmSize:\t 9 kB\nSigPnd:\t0000000000000100\n", False),
        ("State:\tR (running)\nSigPnd:\t0000000000000000\n", False),
    ],
    ids=["sleeps", "another signal", "told to end", "takes its memory apart"],
)
def test_threads_that_end(lines: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "status"
    table.write_text(lines)
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *rest: real(table, *rest))
    assert bool(proc.threads_going_on(ME)) is goes_on


def test_memory_grows_by_what_is_written() -> None:
    before = proc.memory(ME)["Anonymous"]
    size = 32 << 20
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE) as filled:  # not the heap, which may have that much left over
        filled.write(os.urandom(1 << 20) * 32)
        assert proc.memory(ME)["Anonymous"] - before >= size * 0.9


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    # A zombie now: it has a status, but neither memory nor descriptors.
    assert proc.status(child.pid).state == "Z"
    assert proc.memory(child.pid) == {}
    assert proc.mapped(child.pid) == {}
    child.wait()
    with pytest.raises(proc.GONE):
        proc.status(child.pid)
    with pytest.raises(proc.GONE):
        list(proc.descriptors(child.pid))
