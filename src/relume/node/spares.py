"""Keepers that wait: started ahead of need, so that no start of a Python interpreter is in anybody's way."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

from relume.engine.jobs import Container
from relume.errors import RelumeError
from relume.keeper.client import Keeper
from relume.node.ground import Ground
from relume.node.places import Places
from relume.runc import Runc

log = logging.getLogger(__name__)


class Spares:
    """Holds ``count`` connected keepers without an app; a taken one is replaced in the background."""

    def __init__(self, places: Places, ground: Ground, runc: Runc, *, outgoing: bool, count: int = 1) -> None:
        self._places = places
        self._ground = ground
        self._runc = runc
        self._outgoing = outgoing
        self._count = count
        self._ready: list[Keeper] = []
        self._making: set[asyncio.Task[None]] = set()
        self._closed = False

    def refill(self) -> None:
        """Make what is missing, in the background."""
        if self._closed:
            return
        for _ in range(self._count - len(self._ready) - len(self._making)):
            task = asyncio.create_task(self._add())
            self._making.add(task)
            task.add_done_callback(self._making.discard)

    async def _add(self) -> None:
        try:
            self._ready.append(await self._make())
        except (RelumeError, OSError) as error:
            log.error("no spare keeper: %s", error)

    async def take(self) -> Keeper:
        """A keeper with a fresh instance id; one that waits, if there is one."""
        while self._ready:
            keeper = self._ready.pop()
            if not keeper.lost.is_set():
                break
            self._ground.clear(
                self._places.instance(keeper.container.instance_id), keeper.container.instance_id
            )
        else:
            keeper = await self._make()
        asyncio.get_running_loop().call_later(1.0, self.refill)
        return keeper

    async def _make(self) -> Keeper:
        instance_id = f"i-{secrets.token_hex(6)}"
        places = self._places.instance(instance_id)
        self._ground.prepare(places)
        keeper = Keeper(
            Container(
                instance_id=instance_id,
                runtime=str(places.runtime),
                runc=str(self._runc.binary),
                runc_root=str(self._runc.root),
                criu=str(self._runc.criu),
                cgroup=places.cgroup,
                outgoing=self._outgoing,
            ),
            _unheard,
        )
        try:
            await Keeper.spawn(keeper.container)
            await keeper.connect()
        except BaseException:  # one that does come up late goes by itself: nobody connects to it
            await keeper.close()
            self._ground.clear(places, instance_id)
            raise
        return keeper

    async def close(self) -> None:
        """End those that wait, and take their ground away; none is made any more."""
        self._closed = True
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)
        for keeper in self._ready:
            await keeper.end()
            await keeper.close()
            self._ground.clear(
                self._places.instance(keeper.container.instance_id), keeper.container.instance_id
            )


def _unheard(event: dict[str, Any]) -> None:
    """A keeper without an app has nothing to say."""
