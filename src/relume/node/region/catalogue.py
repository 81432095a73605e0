"""The verbs of ``relume checkpoints`` that look into the store. All of them block."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from relume.build import Builder
from relume.checkpoint import shelf as shelves
from relume.checkpoint.platform import differences
from relume.checkpoint.shelf import Shelf
from relume.errors import NotFound, StoreError, Untrusted
from relume.node.inspection import described, why_not_on
from relume.node.region import folder
from relume.node.region.view import View
from relume.store import CheckpointName, Manifest

log = logging.getLogger(__name__)


class Catalogue:
    """What the region has, for people."""

    def __init__(self, view: View, shelf: Shelf, builder: Builder) -> None:
        self._view = view
        self._builder = builder
        self._shelf = shelf

    def published(self, checkpoint_id: str) -> CheckpointName | None:
        """The name in the store of a checkpoint that lies here."""
        return folder.published(self._shelf.directory(checkpoint_id))

    def rows(self, here: Iterable[str]) -> list[dict[str, Any]]:
        """Rows of ``checkpoints ls`` for what is not whole on this node; a store that is gone has none."""
        known = set(here)
        partial = {entry.id for entry in self._view.region.cache.entries() if not entry.complete}
        rows = []
        try:
            names = self._view.starts.names()
        except StoreError as error:
            log.warning("checkpoints of the region: %s", error.message)
            return []
        for name in names:
            try:
                manifest = self._view.manifest(name)
            except StoreError as error:
                self._view.forget(name)
                rows.append(_row(name, None, f"refused: {error.message}", ["remote"]))
                continue
            if manifest.facts.get("checkpoint_id") in known:
                continue
            state = "quarantined" if name.id in self._view.refused else "ready"
            rows.append(
                _row(name, manifest, state, ["partial", "remote"] if name.id in partial else ["remote"])
            )
        return rows

    def inspect(self, checkpoint_id: str) -> dict[str, Any]:
        """``checkpoints inspect`` of one that is not whole on this node. Raises NotFound, StoreError."""
        manifest = self._view.resolve(checkpoint_id)
        name, refused = manifest.name, self._view.refused
        try:
            checkpoint = shelves.from_json(manifest.facts)
        except (KeyError, TypeError) as error:
            raise Untrusted(f"{name.id} has no usable record: {error!r}") from None
        reasons = differences(checkpoint.platform, self._view.platform)
        try:
            build = self._builder.load(name.build)
        except NotFound:
            build = None
        reasons += why_not_on(build, checkpoint, manifest.layers)
        if name.id in refused:
            reasons.append(f"quarantined: {refused[name.id]}")
        row = _row(name, manifest, "quarantined" if name.id in refused else "ready", ["remote"])
        return (
            row
            | described(checkpoint)
            | {"region": self._about(manifest), "would_be_used": not reasons, "why_not": reasons}
        )

    def about(self, checkpoint_id: str) -> dict[str, Any] | None:
        """What the store has of one that lies here; None for one that is not published. Raises nothing."""
        name = self.published(checkpoint_id)
        try:
            return None if name is None else self._about(self._view.manifest(name))
        except StoreError as error:
            return {"name": name.id if name else None, "error": error.message}

    def _about(self, manifest: Manifest) -> dict[str, Any]:
        """``stored_bytes`` is what a reader may fetch, ``new_stored_bytes`` what it added to the store: the rest,
        ``shared_percent``, was there from other builds."""
        sizes = manifest.sizes
        return {
            "name": manifest.name.id,
            "node": manifest.node,
            "signed_by": "this node's region"
            if self._view.region.keyring.shared
            else f"node {manifest.node}, by its own key",
            "signed_in_epoch": manifest.epoch,
            "layers": list(manifest.layers),
            "plain_bytes": sizes.plain,
            "data_bytes": sizes.data,
            "stored_bytes": sizes.stored,
            "new_stored_bytes": sizes.new_stored,
            "shared_percent": round(sizes.shared_percent, 1),
            "working_set_stored_bytes": self._view.starts.working_set_bytes(manifest.name),
        }

    def verify(self, checkpoint_id: str) -> dict[str, Any]:
        """Read every object of it in the store. Raises NotFound, StoreError."""
        verdict = self._view.region.verify(self._view.resolve(checkpoint_id).name)
        return {
            "checkpoint_id": checkpoint_id,
            "ok": verdict.clean,
            "objects": verdict.objects,
            "bytes": verdict.bytes,
            "problems": list(verdict.problems),
        }

    def remove(self, checkpoint_id: str) -> bool:
        """Take it out of sight in the whole region; False when it is not there. Raises StoreError."""
        try:
            name = self.published(checkpoint_id) or self._view.resolve(checkpoint_id).name
        except NotFound:
            return False
        self._view.region.remove(name)
        self._view.removed.add(name.id)
        self._shelf.unlink(checkpoint_id)
        return True

    def remove_app(self, app: str) -> int:
        """Remove every checkpoint and build of an app from the region; how many there were. Raises StoreError."""
        return len(self._view.region.remove_app(app)) + self._view.region.remove_builds(app)

    def collect(self, *, delete: bool) -> dict[str, Any]:
        """Garbage collection. Raises Conflict, StoreError."""
        return dataclasses.asdict(self._view.region.collect(dry_run=not delete))

    def export(self, checkpoint_id: str, path: Path) -> dict[str, Any]:
        """One file with all of it. Raises NotFound, StoreError."""
        self._view.region.export(self._view.resolve(checkpoint_id).name, path)
        return {"checkpoint_id": checkpoint_id, "file": str(path), "bytes": path.stat().st_size}

    def import_(self, path: Path) -> dict[str, Any]:
        """What :meth:`export` wrote, into the store. Raises StoreError, NotFound."""
        try:
            with path.open("rb") as file:
                name = self._view.region.import_(file)
        except FileNotFoundError:
            raise NotFound(f"no file {path}") from None
        return {
            "file": str(path),
            "name": name.id,
            "checkpoint_id": self._view.manifest(name).facts.get("checkpoint_id"),
        }


def _row(name: CheckpointName, manifest: Manifest | None, state: str, where: list[str]) -> dict[str, Any]:
    facts = manifest.facts if manifest else {}
    return {
        "checkpoint_id": facts.get("checkpoint_id", name.id),
        "app": manifest.app if manifest else None,
        "build_id": name.build,
        "platform": name.platform,
        "state": state,
        "where": where,
        "upload": None,
        "size_bytes": facts.get("size_bytes", 0),
        "created_at": manifest.created_at if manifest else None,
    }
