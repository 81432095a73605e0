"""What this machine says of its memory."""

from __future__ import annotations

import os

from relume.linux import memory


def test_bytes_of_this_machine() -> None:
    there = memory.machine()
    assert 0 < there.available <= there.total
    assert there.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
