"""The order of the reasons to skip is the contract."""

from __future__ import annotations

import itertools

import pytest

from relume.checkpoint.policy import Situation, skip

ORDER = ["disabled", "restored", "deferred", "exists", "in_progress"]


@pytest.mark.parametrize("holds", list(itertools.product([False, True], repeat=5)))
def test_the_first_rule_that_applies_names_the_reason(holds: tuple[bool, ...]) -> None:
    disabled, restored, deferred, exists, in_progress = holds
    situation = Situation(
        checkpointing=not disabled,
        restored=restored,
        deferred=deferred,
        exists=exists,
        in_progress=in_progress,
    )
    expected = next((reason for reason, applies in zip(ORDER, holds, strict=True) if applies), None)
    assert skip(situation) == expected
