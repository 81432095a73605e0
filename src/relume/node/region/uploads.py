"""How a checkpoint of this node comes into the store: the right to make it, then its upload in the background.

The store is asked before a checkpoint is made (has the region one, is another node at it?), and after it was made,
until it is there, over restarts of the node too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from relume.build import Builder
from relume.checkpoint import shelf as shelves
from relume.checkpoint.capture import Elsewhere
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.errors import BadRequest, Conflict, NotFound, RelumeError, Untrusted
from relume.node.region import folder
from relume.node.region.learned import Learned
from relume.node.region.threads import in_background
from relume.node.region.view import View
from relume.store import Lease, LocalCheckpoint, Progress

log = logging.getLogger(__name__)

AGAIN_S = (5.0, 30.0, 120.0)
"""Seconds before a failed upload is tried again; the last for ever."""

Spawn = Callable[[Coroutine[Any, Any, Any]], Any]


class Claim:
    """The lease on one build's checkpoint; ``lease`` is None where it may not be, or could not be, published now."""

    def __init__(self, uploads: Uploads, lease: Lease | None, kept: contextlib.ExitStack) -> None:
        self._uploads = uploads
        self._lease = lease
        self._kept = kept

    def settle(self, checkpoint_id: str | None) -> None:
        if checkpoint_id is None:
            self._uploads.spawn(in_background(self._kept.close))
        else:
            self._uploads.begin(checkpoint_id, self._lease, self._kept)


class Uploads:
    """What goes from this node into the store. See relume.checkpoint.capture.Region."""

    def __init__(
        self,
        view: View,
        learned: Learned,
        shelf: Shelf,
        builder: Builder,
        spawn: Spawn,
    ) -> None:
        self.spawn = spawn
        self._view = view
        self._learned = learned
        self._shelf = shelf
        self._builder = builder
        self._running: dict[str, Progress] = {}

    def progress(self, checkpoint_id: str) -> str | None:
        """How far an upload is; None when none goes on."""
        progress = self._running.get(checkpoint_id)
        return None if progress is None else str(progress) if progress.total else "waiting"

    async def claim(self, app: str, build_id: str) -> Claim | Elsewhere:
        """Before a dump: may this node make the build's checkpoint?"""
        kept = contextlib.ExitStack()
        try:
            existing = await asyncio.to_thread(self._existing, build_id)
            if existing is not None:
                return Elsewhere("exists", existing)
            if build_id in self._view.foreign:
                return Claim(self, None, kept)
            await asyncio.to_thread(self._view.prove)
            key = self._view.platform.key
            lease = await asyncio.to_thread(self._view.region.lease, app, build_id, key)
            await asyncio.to_thread(kept.enter_context, lease.kept())
            return Claim(self, lease, kept)
        except Conflict:
            return Elsewhere("in_progress")
        except RelumeError as error:
            log.warning("checkpoint of %s: this node goes on alone: %s", build_id, error.message)
            return Claim(self, None, kept)

    def _existing(self, build_id: str) -> str | None:
        """The id of the region's checkpoint that this node would use; one refused here does not count."""
        try:
            manifest = self._view.find(build_id, self._view.starts)
        except Untrusted:
            return None
        if manifest is None or manifest.name.id in self._view.refused:
            return None
        return str(manifest.facts.get("checkpoint_id", manifest.name.id))

    def take_up(self) -> None:
        """At the node's start: what an earlier run of it did not bring there."""
        for checkpoint in self._shelf.all():
            directory = self._shelf.directory(checkpoint.checkpoint_id)
            if directory.parent == self._shelf.root and folder.published(directory) is None:
                self.begin(checkpoint.checkpoint_id, None, contextlib.ExitStack())

    def begin(self, checkpoint_id: str, lease: Lease | None, kept: contextlib.ExitStack) -> None:
        """Upload in the background, under ``lease`` (kept by ``kept``) or one to be taken."""
        self._running[checkpoint_id] = Progress()
        self.spawn(self._upload(checkpoint_id, lease, kept))

    async def _upload(self, checkpoint_id: str, lease: Lease | None, kept: contextlib.ExitStack) -> None:
        tries = 0
        try:
            while True:
                try:
                    await in_background(self._publish, checkpoint_id, lease)
                    return
                except (NotFound, BadRequest) as error:
                    log.info("%s is not published: %s", checkpoint_id, error.message)
                    return
                except Untrusted as error:
                    log.warning("%s is not published: %s", checkpoint_id, error.message)
                    return
                except (RelumeError, OSError) as error:
                    if not self._shelf.directory(checkpoint_id).is_dir():
                        return  # removed meanwhile
                    pause = AGAIN_S[min(tries, len(AGAIN_S) - 1)]
                    log.warning("upload of %s: %s; again in %.0f s", checkpoint_id, error, pause)
                tries += 1
                await in_background(kept.close)
                lease = None
                await asyncio.sleep(pause)
        finally:
            self._running.pop(checkpoint_id, None)
            await in_background(kept.close)

    def _publish(self, checkpoint_id: str, lease: Lease | None) -> None:
        checkpoint = self._shelf.load(checkpoint_id)
        directory = self._shelf.directory(checkpoint_id)
        if self._shelf.health(checkpoint_id).quarantined:
            raise BadRequest("it is quarantined")
        if checkpoint.platform.gpu:
            raise BadRequest("it has device memory, which does not travel")
        if lease is None:
            self._view.prove()
            self._publish_without_lease(checkpoint, directory)
            return
        log.info("upload of %s begins", checkpoint_id)
        began = time.monotonic()
        progress = self._running.setdefault(checkpoint_id, Progress())
        held = directory / "held"
        folder.write_root(directory)
        manifest = self._view.region.publish(
            lease,
            LocalCheckpoint(
                app=checkpoint.app,
                build=checkpoint.build_id,
                platform=checkpoint.platform.key,
                images=directory / "images",
                files=held if held.is_dir() and any(held.iterdir()) else None,
                companions=[directory / shelves.RECORD, directory / folder.ROOT],
                facts=dataclasses.asdict(checkpoint),
                layers=[layer.digest for layer in self._builder.load(checkpoint.build_id).layers],
            ),
            progress,
            mend=self._view.refuses(checkpoint.build_id),
        )
        seconds = time.monotonic() - began
        log.info("%s is published as %s in %.1f s: %s", checkpoint_id, manifest.name.id, seconds, progress)
        folder.mark(directory, manifest.name)
        self._learned.publish(manifest, directory)

    def _publish_without_lease(self, checkpoint: Checkpoint, directory: Path) -> None:
        """An upload that an earlier run of this node left, or that failed: is it there, may it be made?"""
        build_id, key = checkpoint.build_id, checkpoint.platform.key
        if reason := self._view.foreign.get(build_id):
            raise BadRequest(f"the region's own is refused here: {reason}")
        for name in self._view.region.names(build_id):
            if name.platform == key and name.id not in self._view.refused:
                manifest = self._view.manifest(name)
                if manifest.facts.get("checkpoint_id") == checkpoint.checkpoint_id:
                    folder.mark(directory, name)
                    self._learned.publish(manifest, directory)
                    return
                raise BadRequest(f"the region has {name.id} for its build")
        with self._view.region.lease(checkpoint.app, build_id, key).kept() as lease:
            self._publish(checkpoint.checkpoint_id, lease)
