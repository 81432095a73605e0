"""What the rules about doubtful memory take for granted of the kernel, asked of the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from relume.linux import userfaultfd

PAGE = mmap.PAGESIZE


@pytest.fixture
def place() -> Iterator[tuple[int, int]]:
    """A userfaultfd, and the address of 16 pages of which it has the first 8."""
    try:
        descriptor = userfaultfd.open_userfaultfd(0, user_mode_only=True)
    except OSError as error:
        pytest.skip(f"no userfaultfd here: {error}")
    memory = mmap.mmap(-1, 16 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(memory)
    userfaultfd.register(descriptor, ctypes.addressof(anchor), 8 * PAGE)
    yield descriptor, ctypes.addressof(anchor)
    os.close(descriptor)
    del anchor
    memory.close()


def test_asking_says_what_a_copy_would_and_gives_nothing(place: tuple[int, int]) -> None:
    descriptor, start = place
    for first, count, answer in [(0, 8, 0), (7, 1, 0), (7, 2, errno.ENOENT), (8, 1, errno.ENOENT)]:
        assert userfaultfd.ask(descriptor, start + first * PAGE, count * PAGE) == answer
    assert userfaultfd.zero(descriptor, start, 2 * PAGE) == (2 * PAGE, 0), "nothing had been put there"
    assert userfaultfd.ask(descriptor, start, 8 * PAGE) == 0
    assert userfaultfd.ask(descriptor, start + 2 * PAGE, PAGE) == 0
