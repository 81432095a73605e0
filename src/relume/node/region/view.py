"""The store through this node's eyes: which checkpoints are there, which fit this machine, which it refuses.

Two handles on one store: ``region`` has the time of background work; ``starts`` has the patience of somebody who
waits, and counters that no upload adds to.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from relume.checkpoint.platform import Platform, differences
from relume.errors import NotFound, StoreError, Untrusted
from relume.store import CheckpointName, Manifest, Patience, Region, RegionConfig

log = logging.getLogger(__name__)


class View:
    """Blocks; any thread. What is refused here is remembered until the node restarts."""

    def __init__(
        self, settings: RegionConfig, state: Path, node_id: str, platform: Platform, *, start_wait_s: float
    ) -> None:
        """``start_wait_s`` is what a start waits for each object of a store that does not answer.

        Raises ConfigError for a URL or key file that will not do. Talks to nobody yet.
        """
        self.settings = settings
        self.state = state
        self.node_id = node_id
        self.platform = platform
        self.region = Region(settings, state, node_id)
        self.starts = self.region.with_patience(Patience(bound_s=start_wait_s, request_s=start_wait_s))
        self.refused: dict[str, str] = {}
        """Why not, by a checkpoint's id in the store."""
        self.removed: set[str] = set()
        """The ids in the store of checkpoints that this node took out of the region."""
        self.foreign: dict[str, str] = {}
        """Builds whose manifest this node must not use, and why."""
        self._manifests: dict[CheckpointName, Manifest] = {}
        self._proven = False

    def prove(self) -> None:
        """Before anything relies on a lease: create-if-absent excludes. Raises StoreError."""
        if not self._proven:
            self.starts.prove()
            self._proven = True

    def manifest(self, name: CheckpointName) -> Manifest:
        """It never changes, so it is read once. Raises ObjectMissing, Untrusted, StoreError."""
        if name not in self._manifests:
            self._manifests[name] = self.region.manifest(name)
        return self._manifests[name]

    def forget(self, name: CheckpointName) -> None:
        self._manifests.pop(name, None)

    def find(self, build_id: str, region: Region) -> Manifest | None:
        """The checkpoint of a build to use here. Raises Untrusted for one that this node must not use, and
        remembers why; StoreError."""
        try:
            found = region.find(build_id, self.platform.key, self.fits)
        except Untrusted as error:
            self.foreign[build_id] = error.message
            with contextlib.suppress(StoreError):
                for name in region.names(build_id):
                    if name.platform == self.platform.key:
                        self.refuse(name, error.message)
            raise
        self.foreign.pop(build_id, None)
        return found

    def why_unfit(self, build_id: str) -> str | None:
        """Why none of the region's checkpoints of a build fits this machine; None where there is none."""
        reasons = []
        for name in self.starts.names(build_id):
            with contextlib.suppress(Untrusted, KeyError, TypeError):
                taken_on = Platform.from_json(self.manifest(name).facts["platform"])
                reasons += differences(taken_on, self.platform)
        return "; ".join(dict.fromkeys(reasons)) or None

    def fits(self, manifest: Manifest) -> bool:
        try:
            return not differences(Platform.from_json(manifest.facts["platform"]), self.platform)
        except (KeyError, TypeError):
            return False

    def refuse(self, name: CheckpointName, reason: str) -> None:
        """Not to be used here any more, and not to be kept."""
        log.warning("%s is quarantined here: %s", name.id, reason)
        self.refused[name.id] = reason
        self.region.cache.evict(name.id)

    def refuses(self, build_id: str) -> bool:
        """Whether something of this build was found damaged here: what takes its place is sent whole."""
        return any(CheckpointName.from_id(refused).build == build_id for refused in self.refused)

    def resolve(self, checkpoint_id: str) -> Manifest:
        """The manifest of the checkpoint with this id, or with this name in the store. Raises NotFound, StoreError."""
        for name in self.region.names():
            with contextlib.suppress(Untrusted):
                manifest = self.manifest(name)
                if checkpoint_id in (name.id, manifest.facts.get("checkpoint_id")):
                    return manifest
        raise NotFound(
            f"no checkpoint {checkpoint_id} in the region that this node can read",
            hint="relume checkpoints ls shows them",
        )
