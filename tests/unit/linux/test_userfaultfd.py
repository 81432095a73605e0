"""What the pager takes for granted of the kernel, asked of the kernel: conditions, guards, huge pages."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relume.linux import userfaultfd
from relume.linux.userfaultfd import Condition, Fault, Remove

PAGE = 4096
HUGE = 2 << 20
ROOT = Path(__file__).parents[3]

_CHILD = """
import ctypes, mmap, os, socket, sys
from relume.linux import userfaultfd
libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
talk = socket.socket(fileno=int(sys.argv[1]))
descriptor = userfaultfd.open_userfaultfd(userfaultfd.FEATURE_EVENT_REMOVE)
memory = mmap.mmap(-1, 6 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = -(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // (2 << 20)) * (2 << 20)
userfaultfd.register(descriptor, start, 4 << 20)
socket.send_fds(talk, [start.to_bytes(8, "little")], [descriptor])
os.close(descriptor)
while command := talk.recv(1000):
    answer = str(eval(command)).encode()
    talk.send(answer)
"""


class Process:
    """A process whose 4 MiB at ``start`` (a multiple of 2 MiB) are registered, empty."""

    def __init__(self, talk: socket.socket, process: subprocess.Popen[bytes]) -> None:
        start, (self.descriptor,), _, _ = socket.recv_fds(talk, 8, 1)
        self.start = int.from_bytes(start, "little")
        self.process = process
        self._talk = talk

    def begin(self, expression: str) -> None:
        self._talk.send(expression.encode())

    def answer(self) -> str:
        return self._talk.recv(1 << 16).decode()

    def do(self, expression: str) -> str:
        self.begin(expression)
        return self.answer()


@pytest.fixture
def other() -> Iterator[Process]:
    try:
        os.close(userfaultfd.open_userfaultfd(userfaultfd.FEATURE_EVENT_REMOVE))
    except OSError as error:
        pytest.skip(f"no userfaultfd here: {error}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    theirs.close()
    made = Process(ours, child)
    yield made
    child.kill()
    child.wait()
    os.close(made.descriptor)
    ours.close()


@contextmanager
def source(length: int) -> Iterator[int]:
    """The address of ``length`` bytes of 0x41."""
    content = mmap.mmap(-1, length)
    content[:] = b"A" * length
    anchor = ctypes.c_char.from_buffer(content)
    yield ctypes.addressof(anchor)
    del anchor
    content.close()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_conditions_of_another_process(other: Process) -> None:
    """Also where page 0 may not be asked for, which is before Linux 6.18: then GONE would never be seen."""
    assert userfaultfd.condition(other.descriptor) is Condition.QUIET
    other.begin(f"libc.madvise({other.start}, {PAGE}, 4)")
    _until(lambda: userfaultfd.condition(other.descriptor) is Condition.CHANGING)
    assert userfaultfd.alive(other.descriptor)
    assert userfaultfd.read(other.descriptor) == [Remove(other.start, other.start + PAGE)]
    _until(lambda: userfaultfd.condition(other.descriptor) is Condition.QUIET)
    assert other.answer() == "0"
    other.process.kill()
    other.process.wait()
    assert userfaultfd.condition(other.descriptor) is Condition.GONE
    assert not userfaultfd.alive(other.descriptor)


def test_asking_gives_nobody_a_page(other: Process) -> None:
    for _ in range(3):
        userfaultfd.condition(other.descriptor)
    other.begin(f"ctypes.string_at({other.start}, 1)")
    _until(lambda: bool(found := userfaultfd.read(other.descriptor)) and found == [Fault(other.start)])
    assert userfaultfd.zero(other.descriptor, other.start, PAGE) == (PAGE, 0)
    assert other.answer() == r"b'\x00'"


def test_the_kernel_may_use_huge_pages_where_all_is_in(other: Process) -> None:
    """A piece of 2 MiB that has all its pages may become a huge page while its range is registered still."""
    with source(HUGE) as content:
        assert userfaultfd.copy(other.descriptor, other.start, content, HUGE) == (HUGE, 0)
        assert userfaultfd.copy(other.descriptor, other.start + HUGE, content, HUGE - PAGE)[1] == 0
    collapse = "(libc.madvise({}, 2 << 20, 25), ctypes.get_errno())"
    result = other.do(collapse.format(other.start))
    if f", {errno.EINVAL})" in result:
        pytest.skip("no MADV_COLLAPSE here (before Linux 6.1, or without huge pages)")
    assert result.startswith("(0,")
    assert not other.do(collapse.format(other.start + HUGE)).startswith("(0,"), "one with a hole is let be"
    assert other.do(f"ctypes.string_at({other.start + HUGE - PAGE}, 1)") == "b'A'"


def test_the_kernel_wakes_nobody_for_an_unmapping(other: Process) -> None:
    """Who waits for a page that is unmapped meanwhile sleeps until somebody wakes it, and then gets its SIGSEGV."""
    other.do(
        "__import__('threading').Thread("
        f"target=libc.strnlen, args=(ctypes.c_void_p({other.start}), ctypes.c_size_t(1)), daemon=True).start()"
    )
    _until(lambda: userfaultfd.read(other.descriptor) == [Fault(other.start)])
    assert other.do(f"libc.munmap(ctypes.c_void_p({other.start}), {PAGE})") == "0"
    with pytest.raises(subprocess.TimeoutExpired):
        other.process.wait(0.3)
    assert userfaultfd.zero(other.descriptor, other.start, PAGE) == (0, errno.ENOENT)
    userfaultfd.wake(other.descriptor, other.start, PAGE)
    assert other.process.wait(10) == -signal.SIGSEGV
