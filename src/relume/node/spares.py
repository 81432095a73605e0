"""Keepers that wait: forked and connected ahead of need, so that nothing of it is in a start's way."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

from relume.engine.jobs import Container
from relume.errors import RelumeError
from relume.keeper.client import Keeper
from relume.keeper.zygote import Zygote
from relume.node.ground import Ground
from relume.node.places import Places
from relume.runc import Runc

log = logging.getLogger(__name__)


_PATIENCE = 2.0
"""Seconds for keepers in the making to come up when the node goes."""


class Spares:
    """Holds ``count`` connected keepers without an app; a taken one is replaced in the background."""

    def __init__(
        self,
        places: Places,
        ground: Ground,
        runc: Runc,
        zygote: Zygote,
        *,
        outgoing: bool,
        count: int = 2,
    ) -> None:
        self._places = places
        self._ground = ground
        self._runc = runc
        self._zygote = zygote
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
        keeper = self._new()
        try:
            await self.bring_up(keeper)
        except BaseException as error:  # one that does come up late goes by itself: nobody connects to it
            await self._drop(keeper)
            if not isinstance(error, RelumeError | OSError):
                raise
            log.error("no spare keeper: %s", error)
        else:
            self._ready.append(keeper)

    def take(self) -> Keeper:
        """A keeper with a fresh instance id; one that waits, if there is one. To be brought up before use."""
        asyncio.get_running_loop().call_later(1.0, self.refill)
        while self._ready:
            keeper = self._ready.pop()
            if not keeper.lost.is_set():
                return keeper
            self._ground.clear(
                self._places.instance(keeper.container.instance_id), keeper.container.instance_id
            )
        return self._new()

    async def bring_up(self, keeper: Keeper) -> None:
        """Start and connect ``keeper``, unless it has waited. Raises RelumeError or OSError."""
        if not keeper.connected:
            self._ground.prepare(self._places.instance(keeper.container.instance_id))
            await self._zygote.spawn(keeper.container)
            await keeper.connect()

    def _new(self) -> Keeper:
        instance_id = f"i-{secrets.token_hex(6)}"
        places = self._places.instance(instance_id)
        return Keeper(
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

    async def close(self) -> None:
        """End those that wait, and take their ground away; none is made any more."""
        self._closed = True
        if self._making:
            # A keeper that is up can be told to end; one that was just started cannot yet.
            await asyncio.wait(self._making, timeout=_PATIENCE)
        for task in self._making:
            task.cancel()
        await asyncio.gather(*self._making, return_exceptions=True)
        for keeper in self._ready:
            await self._drop(keeper)
        await self._zygote.close()

    async def _drop(self, keeper: Keeper) -> None:
        await keeper.end()
        await keeper.close()
        self._ground.clear(self._places.instance(keeper.container.instance_id), keeper.container.instance_id)


def _unheard(event: dict[str, Any]) -> None:
    """A keeper without an app has nothing to say."""
