"""Prepared instances: restored ahead of need, stopped before their first instruction.

``[relume.checkpoint] prepared = N`` keeps N of them for an app, from its first ``start`` until it is stopped.
A start takes one and lets it run, which is one signal; another is made behind it. They hold memory (their
working set, or nothing with ``prepared_fill = "none"``) and no lock, connection or request. They give way:
to memory pressure, to a new build or checkpoint, to age (waiting is a jump of the monotonic clock for the
app, so an old one is made anew).

Losing one costs a start its head start, never anything else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from relume.build import Build
from relume.checkpoint.shelf import Checkpoint
from relume.errors import RelumeError
from relume.linux import memory
from relume.node.instance import Instance

log = logging.getLogger(__name__)

_TICK = 1.0
_LEAST_MEMORY = 0.10
"""Below this share of the machine's memory available, prepared instances are given up."""
_AFTER_FAILURE = 30.0
_AFTER_SCARCITY = 30.0


class Maker(Protocol):
    """What makes and removes them (relume.node.lifecycle)."""

    def __call__(self, build: Build, checkpoint: Checkpoint) -> Awaitable[Instance]: ...


class Prepared:
    """Keeps the wished number of prepared instances for each app that is in use."""

    def __init__(
        self,
        *,
        current: Callable[[str], tuple[Build, Checkpoint] | None],
        prepare: Maker,
        discard: Callable[[Instance], Awaitable[None]],
    ) -> None:
        """``current`` gives an app's build and usable checkpoint, or None where there is nothing to prepare."""
        self._current = current
        self._prepare = prepare
        self._discard = discard
        self._wanted: set[str] = set()
        self._waiting: list[tuple[Instance, float]] = []
        self._not_before: dict[str, float] = {}
        self._wake = asyncio.Event()

    def want(self, app: str) -> None:
        """The app is in use: prepare for its next start."""
        self._wanted.add(app)
        self._wake.set()

    async def forget(self, app: str) -> None:
        """The app was stopped or removed: nothing is prepared for it any more."""
        self._wanted.discard(app)
        await self._drop([instance for instance, _ in self._waiting if instance.build.app == app])

    def take(self, build: Build, checkpoint: Checkpoint) -> Instance | None:
        """One that fits, which is the caller's from now on."""
        for entry in self._waiting:
            instance, _ = entry
            if self._fits(instance, build, checkpoint):
                self._waiting.remove(entry)
                self._wake.set()
                return instance
        return None

    async def run(self) -> None:
        """Tend them for ever; one at a time, so that starts go first."""
        while True:
            try:
                async with asyncio.timeout(_TICK):
                    await self._wake.wait()
                    await asyncio.sleep(0.2)  # whoever has just started one is using the processors
            except TimeoutError:
                pass
            self._wake.clear()
            await self._drop(self._stale())
            if _memory_is_scarce():
                await self._give_way()
                continue
            for app in sorted(self._wanted):
                await self._tend(app)

    async def _give_way(self) -> None:
        """To whoever needs the memory, and not only until the next look: what is freed may be what is needed."""
        later = time.monotonic() + _AFTER_SCARCITY
        self._not_before.update(dict.fromkeys(self._wanted, later))
        if self._waiting:
            log.warning("memory is scarce: %d prepared instances are given up", len(self._waiting))
        await self._drop([instance for instance, _ in self._waiting])

    async def _tend(self, app: str) -> None:
        current = self._current(app)
        if current is None or time.monotonic() < self._not_before.get(app, 0):
            return
        build, checkpoint = current
        have = sum(self._fits(instance, build, checkpoint) for instance, _ in self._waiting)
        if have >= _wished(build):
            return
        try:
            instance = await self._prepare(build, checkpoint)
        except (RelumeError, OSError) as error:
            log.warning("nothing prepared for %s: %s", app, error)
            self._not_before[app] = time.monotonic() + _AFTER_FAILURE
            return
        self._waiting.append((instance, time.monotonic()))
        self._wake.set()

    def _stale(self) -> list[Instance]:
        stale = []
        for instance, since in self._waiting:
            current = self._current(instance.build.app)
            old = time.monotonic() - since > instance.settings.prepared_max_age
            if old or instance.ended.is_set() or current is None or not self._fits(instance, *current):
                stale.append(instance)
        return stale

    async def _drop(self, instances: list[Instance]) -> None:
        for instance in instances:
            self._waiting = [entry for entry in self._waiting if entry[0] is not instance]
            await self._discard(instance)

    @staticmethod
    def _fits(instance: Instance, build: Build, checkpoint: Checkpoint) -> bool:
        return (
            instance.build.build_id == build.build_id
            and instance.checkpoint_id == checkpoint.checkpoint_id
            and not instance.ended.is_set()
        )


def _wished(build: Build) -> int:
    return int(build.config["relume"]["checkpoint"]["prepared"])


def _memory_is_scarce() -> bool:
    there = memory.machine()
    return there.available < _LEAST_MEMORY * there.total
