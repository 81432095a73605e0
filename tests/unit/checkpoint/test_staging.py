"""Memory first or the disk at once: decided by measured room."""

from __future__ import annotations

import pytest

from relume.checkpoint import staging
from relume.checkpoint.staging import Room

GB = 1 << 30


@pytest.mark.parametrize(
    ("expected", "room", "wanted"),
    [
        (1 * GB, Room(unwritten=3 * GB, available=20 * GB, total=24 * GB), False),  # the page cache takes it
        (8 * GB, Room(unwritten=3 * GB, available=20 * GB, total=24 * GB), True),
        (1 * GB, Room(unwritten=-GB, available=20 * GB, total=24 * GB), True),  # others fill the cache
        (8 * GB, Room(unwritten=3 * GB, available=12 * GB, total=24 * GB), False),  # a tenth must stay free
        (8 * GB, Room(unwritten=0, available=2 * GB, total=24 * GB), False),
    ],
)
def test_by_room(expected: int, room: Room, wanted: bool) -> None:
    assert staging.wanted(expected, room) is wanted
    assert staging.wanted(expected, room, "always") is True
    assert staging.wanted(expected, room, "never") is False


def test_this_machine_has_room_of_some_size() -> None:
    room = staging.measure()
    assert 0 < room.available <= room.total
    assert room.unwritten < room.total
