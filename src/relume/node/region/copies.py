"""Checkpoints of the region on this node's disk: fetched for a start, filled behind it, prefetched or pulled.

One that is whole is linked to the shelf, and from then on is a checkpoint of this node like any other, which the
cache may evict.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from relume.build import Build
from relume.checkpoint import shelf as shelves
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.errors import RelumeError, StoreError, Untrusted
from relume.node.region import folder
from relume.node.region.learned import Learned
from relume.node.region.threads import in_background
from relume.node.region.view import View
from relume.pager.job import Remote
from relume.store import CheckpointName, Fetched, Pin

log = logging.getLogger(__name__)

_WATCH_S = 60.0
_RECHECK_S = 2.0
"""What a start that has its checkpoint here waits for the region's word on it."""
_ENGINE_FAILURES = 2

Spawn = Callable[[Coroutine[Any, Any, Any]], Any]


@dataclasses.dataclass(slots=True)
class Copy:
    """A checkpoint of the region on this node, perhaps with pages still missing. To be ended once."""

    checkpoint: Checkpoint
    fetched: Fetched
    job: dict[str, Any]
    """``remote`` of the pager's job (:class:`relume.pager.job.Remote`)."""
    store_bytes: int
    store_requests: int

    @property
    def directory(self) -> Path:
        return self.fetched.directory

    @property
    def complete(self) -> bool:
        return self.fetched.complete


class Copies:
    """What comes from the store onto this node."""

    def __init__(
        self, view: View, learned: Learned, shelf: Shelf, spawn: Spawn, *, fault_wait_s: float
    ) -> None:
        """``fault_wait_s`` is what an instance waits for memory from a store that does not answer."""
        self._fault_wait_s = fault_wait_s
        self._view = view
        self._learned = learned
        self._shelf = shelf
        self._spawn = spawn
        self._failures: dict[str, int] = {}

    def link_whole(self) -> None:
        """At the node's start: what is whole in the cache is a checkpoint of this node."""
        for entry in self._view.region.cache.entries():
            if entry.complete:
                self._link(entry.directory)

    # --- those that are here ----------------------------------------------------------------------

    async def gone(self, checkpoint_id: str) -> str | None:
        """Why a published checkpoint on this disk must not be used any more; None where it may.

        What was removed or superseded in the region is not used from now on, and not kept where it came from there.
        A store that does not answer soon keeps no start from what lies here.
        """
        name = folder.published(self._shelf.directory(checkpoint_id))
        if name is None:
            return None
        try:
            async with asyncio.timeout(_RECHECK_S):
                standing = await asyncio.to_thread(self._view.starts.standing, name)
        except (StoreError, TimeoutError):
            log.warning("%s is used without a word of the region: its store does not answer", name.id)
            return None
        if standing == "current":
            return None
        reason = f"checkpoint {checkpoint_id} is {standing} in the region"
        log.warning("%s: it is not used here any more", reason)
        self._shelf.set_aside(checkpoint_id, reason)
        if self._shelf.directory(checkpoint_id).parent != self._shelf.root:
            self._shelf.unlink(checkpoint_id)
            await asyncio.to_thread(self._view.region.cache.evict, name.id)
        return reason

    def pin(self, checkpoint_id: str) -> Pin | None:
        """Keep one that lies in the cache from eviction, and count it as used now; None for any other."""
        directory = self._shelf.directory(checkpoint_id)
        if directory.parent != self._view.region.cache.root:
            return None
        return self._view.region.cache.pin(directory.name)

    # --- for a start ------------------------------------------------------------------------------

    async def find(self, build: Build) -> tuple[str | None, Copy | None]:
        """The region's checkpoint of a build, brought here as far as a restore needs; or why there is none."""
        try:
            return await asyncio.to_thread(self._find, build)
        except Untrusted as error:
            return f"the region's checkpoint is refused: {error.message}", None
        except (RelumeError, OSError) as error:
            log.warning("the region has nothing for %s: %s", build.app, error)
            return f"the region's store: {error}", None

    def _find(self, build: Build) -> tuple[str | None, Copy | None]:
        view = self._view
        counters = view.starts.counters
        bytes_before, requests_before = counters.bytes_read, counters.requests
        manifest = view.find(build.build_id, view.starts)
        if manifest is None:
            return self._none_fits(build), None
        name = manifest.name
        if name.id in view.refused:
            return f"checkpoint {name.id} of the region is quarantined: {view.refused[name.id]}", None
        if manifest.layers != tuple(layer.digest for layer in build.layers):
            return f"checkpoint {name.id} of the region was taken on other layers", None
        try:
            fetched = view.starts.fetch(name)
        except Untrusted as error:
            view.refuse(name, error.message)
            raise
        try:
            checkpoint = folder.checkpoint_of(fetched, build)
            folder.settle(fetched.directory)
            self._learned.lay(fetched)
        except BaseException:
            fetched.close()
            raise
        return None, Copy(
            checkpoint,
            fetched,
            dataclasses.asdict(self._remote(name)),
            counters.bytes_read - bytes_before,
            counters.requests - requests_before,
        )

    def _remote(self, name: CheckpointName) -> Remote:
        settings = self._view.settings
        return Remote(
            url=settings.url,
            key_file=str(settings.key_file) if settings.key_file else None,
            state=str(self._view.state),
            node=self._view.node_id,
            cache_bytes=settings.cache_bytes,
            build=name.build,
            platform=name.platform,
            generation=name.generation,
            patience_s=self._fault_wait_s,
        )

    def look(self, build: Build) -> tuple[str | None, str | None]:
        """What :meth:`find` would find, fetching nothing: (reason, checkpoint id). Blocking."""
        try:
            manifest = self._view.find(build.build_id, self._view.starts)
        except RelumeError as error:
            return f"the region's store: {error.message}", None
        if manifest is None:
            return self._none_fits(build), None
        if manifest.layers != tuple(layer.digest for layer in build.layers):
            return f"checkpoint {manifest.name.id} of the region was taken on other layers", None
        if manifest.name.id in self._view.refused:
            return f"the region's is quarantined: {self._view.refused[manifest.name.id]}", None
        return None, str(manifest.facts.get("checkpoint_id", manifest.name.id))

    def _none_fits(self, build: Build) -> str | None:
        try:
            unfit = self._view.why_unfit(build.build_id)
        except StoreError:
            return None
        return f"the region's checkpoint does not fit this machine: {unfit}" if unfit else None

    def finish(self, copy: Copy) -> None:
        """The instance needs the store no more: bring the rest, so that the next start is local. In the background."""
        self._spawn(in_background(self._finish, copy))

    def _finish(self, copy: Copy) -> None:
        """Blocking. Raises nothing."""
        name = copy.fetched.manifest.name
        try:
            if self._view.starts.fill(copy.fetched):
                self._link(copy.directory)
                log.info("%s is whole on this node", name.id)
                self._learned.publish(copy.fetched.manifest, copy.directory)
        except Untrusted as error:
            self._view.refuse(name, error.message)
        except (RelumeError, OSError) as error:
            log.warning("the rest of %s did not come: %s", name.id, error)
        finally:
            copy.fetched.close()

    def complete(self, copy: Copy) -> Copy:
        """All of it, before a restore that reads everything. Blocking. Raises StoreError, Untrusted, OSError."""
        self._view.starts.fill(copy.fetched)
        return dataclasses.replace(copy, fetched=dataclasses.replace(copy.fetched, complete=True))

    def failed(self, copy: Copy, error: Exception) -> bool:
        """A restore from ``copy`` failed; whether it counts as damaged from now on. Ends the copy. Blocking."""
        name = copy.fetched.manifest.name
        copy.fetched.close()
        log.warning("restore of %s failed: %s", name.id, error)
        if isinstance(error, Untrusted):
            self._view.refuse(name, error.message)
            return True
        if not isinstance(error, StoreError):
            self._failures[name.id] = self._failures.get(name.id, 0) + 1
            if self._failures[name.id] >= _ENGINE_FAILURES:
                self._view.refuse(name, str(error))
                return True
        return False

    # --- ahead of a start -------------------------------------------------------------------------

    async def watch(self) -> None:
        """``[region] prefetch``: what is new in the store is here before it is asked for."""
        known: set[CheckpointName] = set()
        while True:
            try:
                for name in await in_background(self._view.region.names):
                    if name not in known and name.platform == self._view.platform.key:
                        known.add(name)
                        await in_background(self._prefetch, name)
            except (RelumeError, OSError) as error:
                log.warning("prefetch: %s", error)
            await asyncio.sleep(_WATCH_S)

    def fetch_ahead(self, build_id: str) -> None:
        """A build comes onto this node: what its first start needs comes at the same time. In the background."""
        self._spawn(in_background(self._fetch_ahead, build_id))

    def _fetch_ahead(self, build_id: str) -> None:
        try:
            manifest = self._view.find(build_id, self._view.region)
            if manifest is not None and manifest.name.id not in self._view.refused:
                self._prefetch(manifest.name)
        except (RelumeError, OSError) as error:
            log.warning("the checkpoint of build %s is not fetched ahead: %s", build_id, error)

    def _prefetch(self, name: CheckpointName) -> None:
        try:
            manifest = self._view.manifest(name)
            if manifest.node != self._view.node_id:
                self._view.region.prefetch(name)
                log.info("prefetched %s", name.id)
        except Untrusted as error:
            self._view.refuse(name, error.message)

    def pull(self, checkpoint_id: str) -> dict[str, Any]:
        """All of it onto this node. Raises NotFound, StoreError. Blocking."""
        manifest = self._view.resolve(checkpoint_id)
        fetched = self._view.region.fetch(manifest.name)
        try:
            folder.settle(fetched.directory)
            self._learned.lay(fetched)
            self._view.region.fill(fetched, self._view.settings.limits.parallel)
            self._link(fetched.directory)
        finally:
            fetched.close()
        return {"checkpoint_id": checkpoint_id, "name": manifest.name.id, "data_bytes": manifest.sizes.data}

    def _link(self, directory: Path) -> None:
        try:
            folder.settle(directory)
            checkpoint = shelves.read(directory)
        except (OSError, ValueError, TypeError, KeyError, Untrusted) as error:
            log.warning("%s in the cache is no checkpoint: %s", directory.name, error)
            return
        folder.mark(directory, CheckpointName.from_id(directory.name))
        self._shelf.link(checkpoint.checkpoint_id, directory)
        if directory.name in self._view.removed:  # while the rest of it came
            self._shelf.unlink(checkpoint.checkpoint_id)
