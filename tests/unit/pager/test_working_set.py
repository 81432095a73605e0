"""Working sets: the file that costs only time when it is wrong, the order, what is kept and what drops out."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from relume.pager import working_set
from relume.pager.working_set import BLOCK_BYTES, Piece, Run, WorkingSet, plan, refine, withheld

PAGE = 4096
VALID = b'{"version": 1, "images": IMAGES, "turn": 0, "history": []}'
IMAGES = {1: 64 * BLOCK_BYTES, 2: BLOCK_BYTES}

pieces = st.lists(
    st.builds(
        lambda pages_id, page, count: Piece(pages_id, page * PAGE, count * PAGE),
        st.integers(1, 2),
        st.integers(0, 1200),
        st.integers(1, 300),
    ),
    max_size=8,
)


def _pages(found: list[Piece] | tuple[Piece, ...]) -> list[tuple[int, int]]:
    return [
        (piece.pages_id, piece.offset // PAGE + page)
        for piece in found
        for page in range(piece.length // PAGE)
    ]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = WorkingSet(IMAGES, (Piece(1, 0, PAGE), Piece(2, PAGE, 2 * PAGE)), 3, (Run(True, 0.25, 4096),))
    working_set.save(tmp_path / "set", saved)
    assert working_set.load(tmp_path / "set", IMAGES) == (saved, "")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("where", [5, 200, -1])
def test_a_damaged_file_is_no_working_set(tmp_path: Path, where: int) -> None:
    path = tmp_path / "set"
    working_set.save(path, WorkingSet(IMAGES, tuple(Piece(1, n * PAGE, PAGE) for n in range(0, 40, 2))))
    data = bytearray(path.read_bytes())
    data[where] ^= 8
    path.write_bytes(data)
    assert working_set.load(path, IMAGES) == (None, f"{path}: is damaged")


def test_other_images_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "set"
    assert working_set.load(path, IMAGES) == (None, "nothing learned yet")
    working_set.save(path, WorkingSet(IMAGES, ()))
    assert "other images" in working_set.load(path, {1: 4096})[1]


@settings(deadline=None, max_examples=50)
@given(pieces)
def test_a_plan_has_the_same_pages_by_block_in_order_of_first_touch(found: list[Piece]) -> None:
    blocks = plan(found)
    assert {page for block in blocks for page in _pages(block)} == set(_pages(found))
    first_touch = list(
        dict.fromkeys((pages_id, page * PAGE // BLOCK_BYTES) for pages_id, page in _pages(found))
    )
    assert [(block[0].pages_id, block[0].offset // BLOCK_BYTES) for block in blocks] == first_touch
    for block in blocks:
        assert {piece.offset // BLOCK_BYTES for piece in block} == {(block[0].offset) // BLOCK_BYTES}
        assert all(one.offset + one.length < other.offset for one, other in itertools.pairwise(block))


@settings(deadline=None, max_examples=50)
@given(pieces, pieces)
def test_refining_keeps_the_replayed_adds_the_missed_and_names_nothing_twice(
    replayed: list[Piece], touched: list[Piece]
) -> None:
    result = _pages(refine(replayed, [], touched))
    assert result == list(dict.fromkeys(_pages(replayed) + _pages(touched)))


@settings(deadline=None, max_examples=50)
@given(pieces, pieces, st.data())
def test_what_was_kept_back_and_not_touched_drops_out(
    replayed: list[Piece], touched: list[Piece], data: st.DataObject
) -> None:
    back = data.draw(st.lists(st.sampled_from(replayed), unique=True)) if replayed else []
    result, held, needed = (
        set(_pages(refine(replayed, back, touched))),
        set(_pages(back)),
        set(_pages(touched)),
    )
    for piece in replayed:
        own = set(_pages([piece]))
        assert own <= result if not own & held else own & needed <= result
    assert needed <= result <= needed | set(_pages(replayed))
    free = {page for piece in replayed if not (own := set(_pages([piece]))) & held for page in own}
    assert not (held - needed - free) & result


def test_every_block_is_withheld_once_in_a_round() -> None:
    turns = [number for turn in range(working_set.WITHHELD_SHARE) for number in withheld(100, turn)]
    assert sorted(turns) == list(range(100))
    few = [number for turn in range(working_set.WITHHELD_SHARE) for number in withheld(8, turn)]
    assert few == list(range(8)), "one at a time, and most starts with all of it"
    assert len(withheld(1, 0)) == 0


def test_a_replay_that_loses_is_switched_off_and_tried_again_later() -> None:
    learned = WorkingSet(IMAGES, (Piece(1, 0, PAGE),)).after(Run(False, 0.2, 0))
    assert learned.worthwhile
    for _ in range(3):
        learned = learned.after(Run(True, 0.4, 0))
    assert not learned.worthwhile
    for _ in range(20):
        learned = learned.after(Run(learned.worthwhile, 0.4 if learned.worthwhile else 0.2, 0))
    assert any(run.replayed for run in learned.history) or learned.worthwhile
    assert len(learned.history) <= 16


LARGE = tuple(Piece(1, number * BLOCK_BYTES, BLOCK_BYTES) for number in range(40))


def _measured(learned: WorkingSet, starts: int, *, replay: float, without: float) -> list[bool]:
    """Which of so many starts replay."""
    asked = []
    for _ in range(starts):
        asked.append(learned.worthwhile)
        learned = learned.after(Run(asked[-1], replay if asked[-1] else without, 0))
    return asked


def test_a_large_set_is_compared_with_a_start_without_it() -> None:
    """The first start of all hashes the image, so that its time says nothing; a later one is made without."""
    learned = WorkingSet(IMAGES, LARGE).after(None)
    assert learned.history == ()
    assert _measured(learned, 12, replay=0.4, without=0.2) == 3 * [True] + 8 * [False] + [True]
    assert _measured(learned, 12, replay=0.2, without=0.4) == 3 * [True] + [False] + 8 * [True]
    winning = _measured(learned, 200, replay=0.2, without=0.4)
    assert winning.count(False) == 4, "now and then it is compared again"
    assert all(_measured(WorkingSet(IMAGES, LARGE[:2]), 100, replay=0.2, without=0.4)), "a small one never"


def test_what_loses_is_tried_again_and_found_out_again() -> None:
    asked = _measured(WorkingSet(IMAGES, LARGE), 60, replay=0.4, without=0.2)
    assert 3 <= asked[12:].count(True) <= 16


@pytest.mark.parametrize(
    ("header", "packed", "why"),
    [
        (b"[]", b"", "no working set"),
        (b"", b"", "no working set"),
        (b"{" * 100000, b"", "no working set"),
        (b'{"version": 1}', b"", "no working set"),
        (b'{"version": "1", "images": {}}', b"", "version '1' is not known"),
        (b'{"version": 2, "images": {}}', b"", "version 2 is not known"),
        (b'{"version": 1, "images": {"1": 134217728}, "turn": 0, "history": []}', b"", "other images"),
        (b'{"version": 1, "images": {"x": 1}, "turn": 0, "history": []}', b"", "no working set"),
        (b'{"version": 1, "images": IMAGES, "turn": 0, "history": [[1, 2]]}', b"", "no working set"),
        (
            b'{"version": 1, "images": IMAGES, "turn": 0, "history": [[1, NaN, 0]]}',
            b"",
            "times that are none",
        ),
        (b'{"version": 1, "images": IMAGES, "turn": 1e999, "history": []}', b"", "no working set"),
        (b'{"version": 1, "images": IMAGES, "turn": 0, "history": []}', b"abc", "no working set"),
        (VALID, struct.pack("<IQI", 1, 100, 4096), "parts of pages"),
        (VALID, struct.pack("<IQI", 1, 0, 100), "parts of pages"),
        (VALID, struct.pack("<IQI", 1, 0, 0), "parts of pages"),
        (VALID, struct.pack("<IQI", 7, 0, 4096), "pages that the images do not have"),
        (VALID, struct.pack("<IQI", 1, 1 << 63, 4096), "pages that the images do not have"),
        (VALID, struct.pack("<IQI", 2, 0, BLOCK_BYTES) * 70, "names pages twice"),
    ],
)
def test_a_hostile_file_is_no_working_set(tmp_path: Path, header: bytes, packed: bytes, why: str) -> None:
    """Whole by its hash, which anybody can compute, and wrong."""
    sizes = json.dumps({str(pages_id): size for pages_id, size in IMAGES.items()}).encode()
    body = header.replace(b"IMAGES", sizes) + b"\n" + packed
    path = tmp_path / "set"
    path.write_bytes(body + blake3(body).digest())
    learned, reason = working_set.load(path, IMAGES)
    assert learned is None
    assert why in reason


def test_what_is_no_file_is_no_working_set(tmp_path: Path) -> None:
    path = tmp_path / "set"
    os.mkfifo(path)
    assert working_set.load(path, IMAGES)[0] is None
    path.unlink()
    path.mkdir()
    assert working_set.load(path, IMAGES)[0] is None
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert working_set.load(path, IMAGES)[0] is None
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "too large" in working_set.load(path, IMAGES)[1]
    path.unlink()
    path.symlink_to(path)
    assert working_set.load(path, IMAGES)[0] is None


def test_a_replay_that_wins_stays() -> None:
    learned = WorkingSet(IMAGES, ()).after(Run(False, 0.4, 0))
    for _ in range(30):
        learned = learned.after(Run(True, 0.2, 0))
    assert learned.worthwhile
    assert any(not run.replayed for run in learned.history)
