"""One start: what it is to bring up, when its stages were over, whether it was called off, what it came to.

A start belongs to whoever asked for it only until it is asked for: if the caller goes away it goes on, is seen
in ``ps``, and ``stop`` ends it like any instance. So it can be called off at any moment, also in those in which
there is no instance yet, or between a failed restore and the cold boot.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from relume.build import Build
from relume.errors import StartFailed
from relume.node.instance import Instance

T = TypeVar("T")


class Trace:
    """When each stage of a start was over, in seconds since its beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.stages: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        self.stages[stage] = time.monotonic() - self._began

    def merge(self, timeline: Mapping[str, float]) -> None:
        """Stages that the keeper saw, on the same monotonic clock; those from before this start are left out."""
        for stage, at in timeline.items():
            if at >= self._began:
                self.stages[stage] = at - self._began
        self.stages = dict(sorted(self.stages.items(), key=lambda item: item[1]))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began


class Start:
    """One start as it goes. ``under_way``: runc has been asked, so a keeper can tell the next node of it."""

    def __init__(self, build: Build, environment: Mapping[str, str]) -> None:
        self.build = build
        self.environment = environment
        self.trace = Trace()
        self.called_off = asyncio.Event()
        self.under_way = False
        self.over = asyncio.Event()

    def proceed(self) -> None:
        """Raises StartFailed when it was called off."""
        if self.called_off.is_set():
            raise StartFailed(
                f"{self.build.app} was stopped before it was ready",
                hint="somebody stopped it, or its node: relume ps",
            )

    def go(self) -> None:
        """The last moment to call it off without a trace: runc comes next. Raises as :meth:`proceed`."""
        self.trace.mark("keeper")
        self.proceed()
        self.under_way = True

    async def unless_called_off(self, work: Awaitable[T]) -> T:
        """What ``work`` gives; StartFailed, at once, when it is called off (``work`` is cancelled then)."""
        working = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(self.called_off.wait())
        try:
            await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                self.proceed()
            return await working
        finally:
            waiting.cancel()
            working.cancel()


class Starts:
    """Those that go on, known so that they can be called off, for as long as they last."""

    def __init__(self) -> None:
        self._going: set[Start] = set()

    @contextmanager
    def begun(self, build: Build, environment: Mapping[str, str] | None = None) -> Iterator[Start]:
        """A start of ``build``, to its end."""
        start = Start(build, environment or {})
        self._going.add(start)
        try:
            yield start
        finally:
            self._going.discard(start)
            start.over.set()

    async def call_off(self, app: str) -> None:
        """Call off what is being started of ``app``, also where there is no instance of it just now."""
        await _end([start for start in self._going if start.build.app == app])

    async def close(self) -> None:
        """The node goes: call off what has not come to runc."""
        await _end([start for start in self._going if not start.under_way])


async def _end(starts: list[Start]) -> None:
    for start in starts:
        start.called_off.set()
    for start in starts:
        await start.over.wait()


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """What ``start`` answers. ``reason`` says why it was not restored; None when it was."""

    instance: Instance
    reason: str | None
    ready_s: float
    trace: dict[str, float]
    memory: str = "fresh"
    """How its memory came: "fresh" (booted), "paged", or "eager" with the reason behind it."""

    def as_dict(self) -> dict[str, Any]:
        instance = self.instance
        return {
            "instance_id": instance.instance_id,
            "app": instance.build.app,
            "build_id": instance.build.build_id,
            "restored": instance.restored,
            "checkpoint_id": instance.checkpoint_id,
            "reason": self.reason,
            "url": instance.url,
            "ready_s": round(self.ready_s, 4),
            "memory": self.memory,
            "trace": {stage: round(seconds, 4) for stage, seconds in self.trace.items()},
        }
