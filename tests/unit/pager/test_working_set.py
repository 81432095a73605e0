"""Working sets: the file that costs only time when it is wrong, the order, what is kept and what drops out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relume.pager import working_set
from relume.pager.working_set import BLOCK_BYTES, Piece, Run, WorkingSet, plan, refine, withheld

PAGE = 4096
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
    assert len(withheld(8, 3)) == 0


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


def test_a_replay_that_wins_stays() -> None:
    learned = WorkingSet(IMAGES, ()).after(Run(False, 0.4, 0))
    for _ in range(30):
        learned = learned.after(Run(True, 0.2, 0))
    assert learned.worthwhile
    assert any(not run.replayed for run in learned.history)
