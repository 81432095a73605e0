"""Pages of a checkpoint that is not whole on this node: they come from the region's store while the app runs.

Imported only for such a restore: a pager of a local checkpoint knows nothing of stores. The pager opens the
store for itself, because the node may be killed at any time and the instance must go on; the node's cache is what
they share. Guarantees what :class:`relume.store.RemoteSource` does: no byte leaves before it was verified.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from relume.errors import RelumeError
from relume.images.pagemap import Pagemap
from relume.pager.job import Remote
from relume.store import CheckpointName, Patience, Region, RegionConfig, RemoteSource

log = logging.getLogger(__name__)

_PAGE = 4096
_PARALLEL = 4
"""Parts of the working set that are asked for at once."""


class RemoteImages:
    """One cached checkpoint, pinned as long as this process lives."""

    def __init__(self, remote: Remote) -> None:
        """Raises ConfigError, StoreError, Untrusted."""
        config = RegionConfig(
            url=remote.url,
            key_file=Path(remote.key_file) if remote.key_file else None,
            cache_bytes=remote.cache_bytes,
            patience=Patience(bound_s=remote.patience_s, request_s=remote.patience_s),
        )
        self._region = Region(config, Path(remote.state), remote.node)
        self._fetched = self._region.fetch(CheckpointName(remote.build, remote.platform, remote.generation))
        threading.Thread(target=self._bring_working_set, name="working-set", daemon=True).start()

    def _bring_working_set(self) -> None:
        """All of it, in order, from now on: CRIU takes its time, and a store answers several at once no slower."""
        try:
            self._fetched.pages.prefetch(_PARALLEL)
        except (RelumeError, OSError) as error:
            log.warning(
                "working set: %s", error
            )  # whoever needs one of its pages asks again, and fails if it must

    def source(self, pages: Path) -> RemoteSource:
        """The source of one pages file."""
        return RemoteSource(self._fetched.pages, pages.name)

    def bring_what_criu_reads(self, pagemap: Pagemap) -> None:
        """Pages that CRIU reads from the file itself, which can be no fault: they must be there before it runs.

        Raises Untrusted, StoreError.
        """
        for extent in pagemap.extents:
            if not extent.lazy:
                first, count = extent.offset // _PAGE, extent.length // _PAGE
                self._fetched.pages.ensure(pagemap.pages.name, first, count)

    @property
    def facts(self) -> dict[str, int]:
        """What was asked of the store so far, in bytes and requests."""
        counters = self._region.counters
        return {"store_bytes": counters.bytes_read, "store_requests": counters.requests}
