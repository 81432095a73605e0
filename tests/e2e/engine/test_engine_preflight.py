"""What preflight refuses, CRIU refuses too, for the same process; what it lets through, CRIU saves."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.engine import criulog, preflight
from relume.linux import proc
from relume.runc import find_criu

from .conftest import Lab

PRELUDE = """
import ctypes, fcntl, mmap, os, select, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def told(read, write):
    os.close(write)
    assert os.read(read, 1)
    os.close(read)
def in_child(flags):
    read, write = os.pipe()
    if os.fork() == 0:
        if libc.unshare(flags) == 0 and os.fork():
            os.close(write)
        else:
            os.write(write, b"x")
            os.close(write)
        os.close(read)
        time.sleep(100)
    told(read, write)
"""

HEADLESS = "its main thread has ended"

# Numbers of system calls are those of x86_64 where they differ.
REFUSED = {
    "io_uring": ("ring = call(425, 4, ctypes.create_string_buffer(120))", "io_uring ring"),
    "io_uring, mapped": (
        "ring = call(425, 4, ctypes.create_string_buffer(120)); m = mmap.mmap(ring, 4096, mmap.MAP_SHARED)",
        "io_uring ring",
    ),
    "userfaultfd": ("fd = call(323, 0)", "userfaultfd"),
    "memfd_secret": (
        "fd = call(447, 0); os.ftruncate(fd, 4096); m = mmap.mmap(fd, 4096); os.close(fd)",
        "memfd_secret",
    ),
    "perf": ('fd = call(298, struct.pack("IIQ", 1, 112, 0) + bytes(96), 0, -1, -1, 0)', "perf event"),
    "bpf": ('fd = call(321, 0, struct.pack("IIIII", 2, 4, 8, 1, 0) + bytes(60), 72)', "BPF map"),
    "landlock": ('fd = call(444, struct.pack("Q", 1), 8, 0)', "Landlock"),
    "fuse": ('fd = os.open("/dev/fuse", os.O_RDWR)', "device /dev/fuse"),
    "vsock": ("s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "socket of the protocol"),
    "mptcp": ('s = socket.socket(2, 1, 262); s.bind(("127.0.0.1", 0)); s.listen()', "Multipath TCP"),
    "pidfd outside": ("fd = os.pidfd_open(os.getppid())", "pidfd of a process outside"),
    "pidfd of a thread": ("fd = call(434, os.getpid(), os.O_EXCL)", "pidfd of a thread"),
    "message queue": (
        'fd = call(240, b"relume-test", 0o102, 0o600, None); call(241, b"relume-test")',
        "relume-test",
    ),
    "traced": (
        "child = os.fork()\nif child == 0: time.sleep(100)\nlibc.ptrace(0x4206, child, 0, 0)",
        "is traced by python3",
    ),
    "traced by a thread": (
        "import threading\nchild = os.fork()\nif child == 0: time.sleep(100)\n"
        "def trace(): libc.ptrace(0x4206, child, 0, 0); time.sleep(100)\nthreading.Thread(target=trace).start()\n"
        "while 'TracerPid:\t0\\n' in open(f'/proc/{child}/status').read(): time.sleep(0.01)",
        "is traced by python3 (pid",
    ),
    "controlling terminal": (
        "import pty\nread, write = os.pipe()\nchild, fd = pty.fork()\nif child == 0:\n"
        '  os.open("/dev/tty", os.O_RDWR); os.write(write, b"x"); os.close(write); os.close(read); time.sleep(100)\n'
        "told(read, write)",
        "holds /dev/tty",
    ),
    "uts namespace": ("in_child(0x4000000)", "uts namespace"),
    "ipc namespace": ("in_child(0x8000000)", "ipc namespace"),
    "user namespace": ("in_child(0x10000000)", "user namespace"),
    "pid namespace": ("in_child(0x20000000)", "pid namespace"),
    "cgroup namespace": ("in_child(0x2000000)", "cgroup namespace"),
    "main thread ended": (
        "import threading\nchild = os.fork()\nif child == 0:\n"
        "  threading.Thread(target=time.sleep, args=(100,)).start()\n  libc.pthread_exit(None)\n"
        "while 'State:\tZ' not in open(f'/proc/{child}/status').read(): time.sleep(0.01)",
        HEADLESS,
    ),
    "directory of a thread that ended": (
        "import threading; fds = []\n"
        "thread = threading.Thread(target=lambda: fds.append(os.open('/proc/thread-self/fd', os.O_RDONLY)))\n"
        "thread.start(); thread.join()",
        "of a process or thread that has ended",
    ),
    "large deleted file, mapped": (
        'fd = os.open("/tmp/relume-large", os.O_RDWR | os.O_CREAT); os.posix_fallocate(fd, 0, 1100 << 20);'
        'os.unlink("/tmp/relume-large"); libc.mmap(None, 4096, 1, 1, fd, ctypes.c_long(0)); os.close(fd)',
        "holds the deleted file /tmp/relume-large",
    ),
    "time namespace": ("libc.unshare(0x80)", "time namespace"),
}

PASSES = {
    "the usual": "pass",
    "devices": "fds = [os.open(f'/dev/{name}', os.O_RDONLY) for name in ('null', 'zero', 'full', 'urandom')]",
    "memfd": 'fd = os.memfd_create("m"); os.ftruncate(fd, 1 << 20); m = mmap.mmap(fd, 1 << 20)',
    "shared": "m = mmap.mmap(-1, 1 << 20); m[0] = 1",
    "descriptors": (
        "e = select.epoll(); r, w = os.pipe(); e.register(r, 1); a, b = socket.socketpair();"
        "fds = [libc.eventfd(0, 0), libc.timerfd_create(1, 0), libc.inotify_init1(0), os.pidfd_open(os.getpid())]"
    ),
    "sockets": (
        "s = [socket.socket(*each) for each in ((2, 1), (10, 1), (2, 2), (10, 2), (16, 3, 0), (17, 3), (2, 3, 1))];"
        's[0].bind(("127.0.0.1", 0)); s[0].listen()'
    ),
    "zombie": "if os.fork() == 0: os._exit(0)",
    "stopped": "if os.fork() == 0: os.kill(os.getpid(), 19)",
    "aio": "ring = ctypes.c_ulong(0); call(206, 8, ctypes.byref(ring))",
    "own pages of proc": 'f = [open("/proc/self/status"), open("/proc/1/stat")]',
    "deleted file": 'f = open("/tmp/relume-deleted", "w"); f.write("x" * 9999); f.flush(); os.unlink(f.name)',
}


class Plain:
    """A process tree of its own session, outside of any container."""

    def __init__(self, program: str, directory: Path) -> None:
        ready = directory / "ready"
        tail = f"\nopen({str(ready)!r}, 'w').close()\nwhile True: time.sleep(100)\n"
        with (directory / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(
                ["/usr/bin/python3", "-c", PRELUDE + program + tail],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, (
                directory / "stderr"
            ).read_text()
            time.sleep(0.01)

    @property
    def pids(self) -> list[int]:
        found, first = [self._process.pid], 0
        while first < len(found):
            for task in Path(f"/proc/{found[first]}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
            first += 1
        return found

    def dump(self, directory: Path) -> tuple[int, Path]:
        """CRIU's exit status and its log."""
        images = directory / "images"
        images.mkdir()
        done = subprocess.run(
            [
                *(find_criu(), "dump", "--tree", str(self._process.pid), "--images-dir", str(images)),
                *("--leave-running", "--log-file", "dump.log", "-v3", "--shell-job", "--ghost-limit", "1G"),
                *("--link-remap", "--tcp-established", "--ext-unix-sk", "--file-locks", "--skip-in-flight"),
            ],
            capture_output=True,
            timeout=50,
        )
        return done.returncode, images / "dump.log"

    def close(self) -> None:
        for pid in reversed(self.pids):
            os.kill(pid, 9)
        self._process.wait()


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Plain]:
    process = Plain(request.param, tmp_path)
    try:
        yield process
    finally:
        process.close()


@pytest.mark.parametrize(("plain", "words"), REFUSED.values(), ids=REFUSED, indirect=["plain"])
def test_refused_by_both(plain: Plain, words: str, tmp_path: Path) -> None:
    culprits = preflight.examine(plain.pids, rootfs=Path("/"))
    assert any(words in culprit.what for culprit in culprits), culprits
    assert all(culprit.process == "python3" and culprit.hint for culprit in culprits)
    status, log = plain.dump(tmp_path)
    assert status != 0
    told = criulog.explain(log, who=lambda pid: (pid, "python3"))
    if words == HEADLESS:  # CRIU takes it for one that is ending, and does not say which
        assert told.kind == "busy", told
        return
    assert told.kind == "unsupported", told
    assert told.culprits[0].process == "python3"
    assert told.culprits[0].pid in {culprit.pid for culprit in culprits}, (told, culprits)


@pytest.mark.parametrize("plain", PASSES.values(), ids=PASSES, indirect=True)
def test_let_through_by_both(plain: Plain, tmp_path: Path) -> None:
    assert preflight.examine(plain.pids, rootfs=Path("/")) == []
    status, log = plain.dump(tmp_path)
    assert status == 0, criulog.explain(log)


@pytest.mark.parametrize(
    "plain", ["m = mmap.mmap(-1, 300 << 20); m.write(b'x' * (300 << 20))"], indirect=True
)
def test_estimate_is_near_the_truth(plain: Plain, tmp_path: Path) -> None:
    estimate = preflight.estimate(plain.pids)
    status, _ = plain.dump(tmp_path)
    assert status == 0
    written = sum(path.stat().st_size for path in (tmp_path / "images").glob("pages-*.img"))
    assert estimate.processes == 1
    assert 0.99 * written < estimate.memory < 1.1 * written


WATCHER = """
import ctypes, os, time
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0)
os.mkdir("/watched")
libc.inotify_add_watch(watch, b"/watched", 0x100)
print("ready", flush=True)
time.sleep(100)
"""


def test_watches_need_file_handles(lab: Lab) -> None:
    box = lab.boot(WATCHER, options="index=off,nfs_export=off")
    box.wait_for("ready")
    (culprit,) = preflight.examine(box.pids, rootfs=box.rootfs, upper=box.upper, held_limit=1 << 30)
    assert (culprit.pid, culprit.process) == (1, "python3")
    assert "inotify" in culprit.what
    told = criulog.explain(box.dump(check=False).work / "dump.log")
    assert [(each.pid, each.what) for each in told.culprits] == [(1, culprit.what)]

    exported = lab.boot(WATCHER)
    exported.wait_for("ready")
    assert preflight.examine(exported.pids, rootfs=exported.rootfs) == []


QUEUE_AND_FILES = """
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(240, b"jobs", 0o102, 0o600, None) >= 0
big = open("/big", "wb")
big.write(bytes(3 << 20))
big.flush()
print("ready", flush=True)
time.sleep(100)
"""


def test_in_a_container(lab: Lab) -> None:
    box = lab.boot(QUEUE_AND_FILES)
    box.wait_for("ready")
    started = time.process_time()
    culprits = preflight.examine(box.pids, rootfs=box.rootfs, upper=box.upper, held_limit=2 << 20)
    assert time.process_time() - started < 0.05  # our own time: the machine may be busy
    queue, big = culprits
    assert queue.what == "holds the POSIX message queue /jobs"
    assert big.what.startswith("holds /big (open), 3145728 bytes")
    told = criulog.explain(box.dump(check=False).work / "dump.log")
    assert "message queue" in told.reason
    assert proc.status(box.init).state == "S"


def test_too_large_a_file_fails_the_dump_and_leaves_the_app(lab: Lab) -> None:
    box = lab.boot(
        "f = open('/big', 'wb'); f.write(bytes(3 << 20)); f.flush(); print('ready', flush=True)\n"
        "import time\ntime.sleep(100)"
    )
    box.wait_for("ready")
    checkpoint = box.dump(limit=2 << 20, check=False)
    assert checkpoint.report["code"] == "unsupported"
    assert "/big" in str(checkpoint.report["message"])
    assert proc.status(box.init).state == "S"
