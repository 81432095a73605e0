"""Threads for the region's work that nobody waits for: uploads, fills, what is fetched ahead.

A store that does not answer holds each of them for minutes, and there may be as many as there are checkpoints. In the
loop's own threads every start would stand behind them, and every stop. What a start or a deploy itself waits for does
not come here either: it must not stand behind an upload.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from relume.node import threads

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = threads.pool(8, "region")


async def in_background(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """As asyncio.to_thread, in these threads."""
    work = partial(function, *arguments, **named)
    return await asyncio.get_running_loop().run_in_executor(_THREADS, work)
