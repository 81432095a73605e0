"""How instances go: by ``stop``, by their own exit, by their keeper's death, whoever comes first.

Guarantees: one that is gone has left its log and nothing else, and goes once, however many want it to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

from relume.errors import EngineError
from relume.linux import process
from relume.node.gpus import Gpus
from relume.node.ground import Ground
from relume.node.instance import Instance, InstanceState
from relume.node.roster import Roster

log = logging.getLogger(__name__)

_STOP_PATIENCE = 10.0
"""Seconds between SIGTERM and SIGKILL for a process that handles SIGTERM."""

_ASK_PATIENCE = 5.0
"""Seconds for a keeper's answer, which takes it no time."""

_KEEP_ENDED = 10


class Ending:
    """Ends instances of one node."""

    def __init__(
        self, roster: Roster, ground: Ground, gpus: Gpus, *, finish_copy: Callable[[Instance], None]
    ) -> None:
        """``finish_copy`` lets go of what an instance has of the region."""
        self._roster = roster
        self._ground = ground
        self._gpus = gpus
        self._finish_copy = finish_copy

    async def stop(self, instance: Instance) -> None:
        """SIGTERM, patience, SIGKILL; returns when nothing of it is left but its log."""
        if instance.gone.is_set():
            return
        instance.state = "stopping"
        self._roster.save(instance)
        if (start := instance.start) is not None:
            start.called_off.set()
            await start.over.wait()
        if not instance.gone.is_set():
            await self.terminate(instance)
            await self.discard(instance, "exited")

    async def terminate(self, instance: Instance) -> None:
        """SIGTERM and patience, for an app that handles it.

        Without a handler the first process of a pid namespace never sees a SIGTERM (pid_namespaces(7)).
        """
        pid = int((await _ask_pid(instance)) or 0)
        if pid and process.catches(pid, signal.SIGTERM):
            with contextlib.suppress(EngineError, TimeoutError):
                async with asyncio.timeout(_STOP_PATIENCE):
                    await instance.keeper.signal(signal.SIGTERM)
                    await instance.ended.wait()

    async def watch_keeper(self, instance: Instance) -> None:
        """A keeper that dies takes the instance's stdio along: end what is left of it."""
        await instance.keeper.lost.wait()
        if instance.exit_code is None and not instance.discarding:
            log.error("the keeper of %s is gone; ending the instance", instance.instance_id)
            await self.over(instance)

    async def over(self, instance: Instance) -> None:
        """It has ended by itself or was stopped: take its ground away, keep its log."""
        instance.ended.set()
        if instance.start is not None:
            return  # the start sees it, and clears up
        kept = instance.ready.is_set() and not instance.keeper.lost.is_set()
        await self.discard(instance, "exited" if kept or instance.exit_code == 0 else "failed")

    async def discard(self, instance: Instance, state: InstanceState) -> None:
        """End it if it still runs, and leave nothing of it but its log."""
        if instance.discarding:
            await instance.gone.wait()
            return
        instance.discarding = True
        if not instance.paging_failed:  # else whoever reacts to that ends the copy
            self._finish_copy(instance)
        killed = instance.keeper.lost.is_set()
        try:
            # The keeper first: it knows what is going on, a boot or a dump, and ends that too.
            await instance.keeper.end()
            instance.ended.set()
            await instance.keeper.close()
            if killed:
                await asyncio.to_thread(self._ground.end_orphans, instance.places)
            await asyncio.to_thread(self._ground.clear, instance.places, instance.instance_id)
        except OSError as error:
            log.error("clearing up after %s (the next run tries again): %s", instance.instance_id, error)
        finally:
            instance.state = "exited" if instance.state == "stopping" else state
            self._roster.remove(instance)
            self._gpus.take_back(instance.instance_id)
            instance.unpin()
            instance.gone.set()
        self._roster.prune(instance.build.app, _KEEP_ENDED)

    async def forget(self, instance: Instance) -> None:
        """Remove a prepared instance that nobody took; it never ran, so there is nothing to remember of it."""
        await self.discard(instance, "exited")
        self._roster.forget(instance.instance_id)


async def _ask_pid(instance: Instance) -> int | None:
    try:
        async with asyncio.timeout(_ASK_PATIENCE):
            return int((await instance.keeper.ask("hello"))["pid"])
    except (EngineError, TimeoutError):
        return None
