"""A checkpoint taken out of the region while the rest of it still comes onto this node."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.checkpoint.shelf import Shelf
from relume.node.region import copies
from relume.node.region.copies import Copies

NAME = "b1.x86_64-0123456789abcdef.1"


@pytest.mark.parametrize("removed", [set(), {NAME}])
def test_what_was_removed_is_not_here_when_it_is_whole(
    removed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("settle", "mark"):
        monkeypatch.setattr(copies.folder, name, lambda *_: None)
    monkeypatch.setattr(copies.shelves, "read", lambda directory: SimpleNamespace(checkpoint_id="cp-1"))
    shelf = Shelf(tmp_path / "checkpoints")
    view = cast("Any", SimpleNamespace(removed=removed))
    Copies(view, cast("Any", None), shelf, print, fault_wait_s=1.0)._link(tmp_path / NAME)
    assert (shelf.directory("cp-1") == tmp_path / NAME) is not bool(removed)
