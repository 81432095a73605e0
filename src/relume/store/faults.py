"""Named places where a test may kill or fail the process, so that crashes are tested where they hurt.

`point("publish.manifest")` does nothing unless a test has installed a hook. The names are listed in `POINTS`;
a point that is not listed is a programming error, and the crash matrix runs over that list, so a new one is
tested the day it is added.
"""

from __future__ import annotations

from collections.abc import Callable

POINTS = (
    "publish.begin",
    "publish.chunk",
    "publish.index",
    "publish.images",
    "publish.manifest",
    "working_set.part",
    "working_set.list",
    "layer.chunk",
    "layer.index",
    "build.record",
    "fetch.unpacked",
    "fetch.entered",
    "fetch.chunk",
    "fetch.complete",
    "cache.evict",
    "gc.manifest",
    "gc.object",
    "gc.chunk",
)

_hook: Callable[[str], None] | None = None


def install(hook: Callable[[str], None] | None) -> None:
    """Call `hook(name)` at every point from now on; None takes it out again. For tests only."""
    global _hook
    _hook = hook


def point(name: str) -> None:
    """Here a crash is worth testing."""
    if _hook is not None:
        if name not in POINTS:
            raise AssertionError(f"fault point {name!r} is not listed in POINTS")
        _hook(name)
