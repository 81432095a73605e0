"""A shelf, and checkpoints to put on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relume.checkpoint.platform import Platform
from relume.checkpoint.shelf import Checkpoint, Intent, Shelf

PLATFORM = Platform("x86_64", ("avx", "avx2"), "6.12.0", "4.2.1", "1.1.5")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "checkpoints")


@pytest.fixture
def checkpoint_of() -> Callable[..., Checkpoint]:
    """The record of a finished checkpoint, whatever else it says."""

    def make(intent: Intent, **more: Any) -> Checkpoint:
        content: dict[str, Any] = {
            "checkpoint_id": f"cp-{intent.dump_id}",
            "app": intent.app,
            "build_id": intent.build_id,
            "instance_id": intent.instance_id,
            "platform": PLATFORM,
            "created_at": intent.started_at,
            "size_bytes": 3,
            "needs_network": False,
            "lazy_bytes": 3,
            "frozen_s": 0.1,
            "timings": {"frozen_s": 0.1},
            "id_base": 524288,
            "loopback": "keep",
            "filesystem": "held",
            "processes": [{"pid": 1, "name": "python3"}],
            "stopped": [],
            "left_behind": {"files": 2},
            "warnings": [],
        }
        return Checkpoint(**(content | more))

    return make


@pytest.fixture
def begun(shelf: Shelf) -> Callable[..., tuple[Path, Intent]]:
    """A checkpoint in the making, its images written."""

    def begin(build_id: str = "b1", now: float = 1.0) -> tuple[Path, Intent]:
        directory, intent = shelf.begin(instance_id="i-1", app="a", build_id=build_id, now=now)
        (directory / "images").mkdir()
        (directory / "images" / "pages-1.img").write_bytes(b"abc")
        (directory / "held").mkdir()
        (directory / "held" / "link").symlink_to("/nowhere")
        return directory, intent

    return begin
