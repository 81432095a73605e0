"""One node's region: its parts, and the order in which they begin."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from relume.build import Build, Builder
from relume.checkpoint.platform import Platform
from relume.checkpoint.shelf import Shelf
from relume.config import NodeConfig
from relume.errors import StoreError
from relume.node.region.builds import Builds
from relume.node.region.catalogue import Catalogue
from relume.node.region.copies import Copies
from relume.node.region.learned import Learned
from relume.node.region.threads import in_background
from relume.node.region.uploads import Spawn, Uploads
from relume.node.region.view import View
from relume.store import Limits, RegionConfig

log = logging.getLogger(__name__)


class NodeRegion:
    """``open`` before use."""

    def __init__(
        self,
        config: NodeConfig,
        state: Path,
        node_id: str,
        *,
        shelf: Shelf,
        platform: Platform,
        builder: Builder,
        spawn: Spawn,
    ) -> None:
        """Raises ConfigError for a URL or key file that will not do. Talks to nobody yet."""
        assert config.store.url is not None
        self.name = config.region.name
        self._spawn = spawn
        self._prefetching = config.region.prefetch
        settings = RegionConfig(
            url=config.store.url,
            key_file=config.key_file,
            cache_bytes=config.store.max_cache_bytes,
            limits=Limits(config.store.parallel, config.store.max_upload_bytes_per_second),
            grace_s=config.store.gc_grace_hours * 3600,
        )
        self._view = View(settings, state, node_id, platform, start_wait_s=config.region.start_wait_s)
        self._learned = Learned(self._view, shelf)
        self.uploads = Uploads(self._view, self._learned, shelf, builder, spawn)
        self.copies = Copies(self._view, self._learned, shelf, spawn, fault_wait_s=config.region.fault_wait_s)
        self.builds = Builds(self._view, builder, spawn, self.copies.fetch_ahead)
        self.catalogue = Catalogue(self._view, shelf, builder)

    async def open(self, deployed: Iterable[Build]) -> None:
        """Clean up, prove the store, take up what was left undone; ``deployed`` are the builds in use here.

        Raises StoreError for a store that answers and won't do. One that does not answer is proved later.
        """
        await asyncio.to_thread(self._view.region.sweep)
        try:
            await asyncio.to_thread(self._view.prove)
        except StoreError as error:
            if error.details.get("reason") == "not_exclusive":
                raise StoreError(f"[store] url: {error.message}", hint=error.hint) from error
            log.warning("the store is not used for publishing until it answers: %s", error.message)
        self.copies.link_whole()
        self.uploads.take_up()
        self.builds.take_up(deployed)
        if self._prefetching:
            self._spawn(self.copies.watch())

    def learned(self, checkpoint_id: str) -> None:
        """A restore has learned: publish that where it is news. In the background."""
        self._spawn(in_background(self._learned.news, checkpoint_id))
