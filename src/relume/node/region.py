"""The node's side of the region: publish what it makes, find what others made, bring that here.

Only a node with ``[store] url`` has one (and imports :mod:`relume.store`). The store is asked

- before a checkpoint is made: has the region one, is another node at it? (:meth:`NodeRegion.claim`);
- after it was made, in the background: upload, until it is there, over restarts of the node too;
- when a start finds nothing usable on this disk (:meth:`NodeRegion.find`).

Guarantees: a store that does not answer delays these by its patience and fails none of them; what is wrong is
refused with its reason, and not looked at again until the node restarts. A node never publishes over a manifest
that it cannot verify.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from relume.build import Build
from relume.checkpoint import shelf as shelves
from relume.checkpoint.capture import Elsewhere
from relume.checkpoint.platform import Platform, differences
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.config import NodeConfig
from relume.errors import BadRequest, Conflict, NotFound, RelumeError, StoreError, Untrusted
from relume.images import PAGE_SIZE, Pagemap, read_image, read_pagemap
from relume.pager import working_set
from relume.pager.job import Remote
from relume.pager.working_set import Piece, WorkingSet
from relume.store import (
    CheckpointName,
    Fetched,
    Lease,
    LocalCheckpoint,
    Manifest,
    PageRun,
    Patience,
    Progress,
    Region,
    RegionConfig,
    read_from_files,
)

log = logging.getLogger(__name__)

_START_PATIENCE = Patience(bound_s=10.0, request_s=10.0)
"""What a start, or an app's request, waits for a store that does not answer, for each object."""
_AGAIN_S = (5.0, 30.0, 120.0)
"""Seconds before a failed upload is tried again; the last for ever."""
_WATCH_S = 60.0
_MARK = "region.json"
_ROOT = "root.json"
"""Mode, owner and time of the held files' top folder, which is the container's ``/``: the tar has what is in it."""
_PUBLISH_AGAIN = 0.1
"""A working set is published again when it has changed by this share of its bytes."""
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


class _Claim:
    """The lease on one build's checkpoint; ``lease`` is None where it may not be, or could not be, published now."""

    def __init__(self, region: NodeRegion, lease: Lease | None, kept: contextlib.ExitStack) -> None:
        self._region = region
        self._lease = lease
        self._kept = kept

    def settle(self, checkpoint_id: str | None) -> None:
        if checkpoint_id is None:
            self._region.spawn(asyncio.to_thread(self._kept.close))
        else:
            self._region.publish(checkpoint_id, self._lease, self._kept)


class NodeRegion:
    """One node's view of the region. ``open`` before use."""

    def __init__(
        self,
        config: NodeConfig,
        state: Path,
        node_id: str,
        *,
        shelf: Shelf,
        platform: Platform,
        layers_of: Callable[[str], tuple[str, ...]],
        spawn: Spawn,
    ) -> None:
        """Raises ConfigError for a URL or key file that will not do. Talks to nobody yet."""
        assert config.store.url is not None
        self.name = config.region.name
        self.spawn = spawn
        self._state = state
        self._node_id = node_id
        self._shelf = shelf
        self._platform = platform
        self._layers_of = layers_of
        self._prefetching = config.region.prefetch
        self._settings = RegionConfig(
            url=config.store.url, key_file=config.key_file, cache_bytes=config.store.max_cache_bytes
        )
        self._region = Region(self._settings, state, node_id)
        # Starts have less patience, and counters that no upload adds to.
        self._starts = Region(dataclasses.replace(self._settings, patience=_START_PATIENCE), state, node_id)
        self._uploads: dict[str, Progress] = {}
        self._manifests: dict[CheckpointName, Manifest] = {}
        self._refused: dict[str, str] = {}
        self._foreign: dict[str, str] = {}
        self._proven = False
        self._failures: dict[str, int] = {}

    async def open(self) -> None:
        """Clean up, prove the store, take up what was left undone.

        Raises StoreError for a store that answers and won't do. One that does not answer is proved later.
        """
        await asyncio.to_thread(self._region.sweep)
        try:
            await asyncio.to_thread(self._prove)
        except StoreError as error:
            if error.details.get("reason") == "not_exclusive":
                raise StoreError(f"[store] url: {error.message}", hint=error.hint) from error
            log.warning("the store is not used for publishing until it answers: %s", error.message)
        for entry in self._region.cache.entries():
            if entry.complete:
                self._link(entry.directory)
        for checkpoint in self._shelf.all():
            if self._is_own(checkpoint.checkpoint_id) and self.published(checkpoint.checkpoint_id) is None:
                self.publish(checkpoint.checkpoint_id, None, contextlib.ExitStack())
        if self._prefetching:
            self.spawn(self._watch())

    def _prove(self) -> None:
        """Before anything relies on a lease: create-if-absent excludes. Raises StoreError. Blocking."""
        if not self._proven:
            self._starts.prove()
            self._proven = True

    # --- making -----------------------------------------------------------------------------------

    async def claim(self, app: str, build_id: str) -> _Claim | Elsewhere:
        """Before a dump: may this node make the build's checkpoint? See relume.checkpoint.capture.Region."""
        kept = contextlib.ExitStack()
        try:
            existing = await asyncio.to_thread(self._existing, build_id)
            if existing is not None:
                return Elsewhere("exists", existing)
            if build_id in self._foreign:
                return _Claim(self, None, kept)
            await asyncio.to_thread(self._prove)
            lease = await asyncio.to_thread(self._region.lease, app, build_id, self._platform.key)
            await asyncio.to_thread(kept.enter_context, lease.kept())
            return _Claim(self, lease, kept)
        except Conflict:
            return Elsewhere("in_progress")
        except RelumeError as error:
            log.warning("checkpoint of %s: this node goes on alone: %s", build_id, error.message)
            return _Claim(self, None, kept)

    def _existing(self, build_id: str) -> str | None:
        """The id of the region's checkpoint that this node would use; one refused here does not count."""
        try:
            manifest = self._find_manifest(build_id, self._starts)
        except Untrusted:
            return None
        if manifest is None or manifest.name.id in self._refused:
            return None
        return str(manifest.facts.get("checkpoint_id", manifest.name.id))

    def publish(self, checkpoint_id: str, lease: Lease | None, kept: contextlib.ExitStack) -> None:
        """Upload in the background, under ``lease`` (kept by ``kept``) or one to be taken."""
        self._uploads[checkpoint_id] = Progress()
        self.spawn(self._publish(checkpoint_id, lease, kept))

    async def _publish(self, checkpoint_id: str, lease: Lease | None, kept: contextlib.ExitStack) -> None:
        tries = 0
        try:
            while True:
                try:
                    await asyncio.to_thread(self._publish_once, checkpoint_id, lease)
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
                    pause = _AGAIN_S[min(tries, len(_AGAIN_S) - 1)]
                    log.warning("upload of %s: %s; again in %.0f s", checkpoint_id, error, pause)
                tries += 1
                await asyncio.to_thread(kept.close)
                lease = None
                await asyncio.sleep(pause)
        finally:
            self._uploads.pop(checkpoint_id, None)
            await asyncio.to_thread(kept.close)

    def _publish_once(self, checkpoint_id: str, lease: Lease | None) -> None:
        checkpoint = self._shelf.load(checkpoint_id)
        directory = self._shelf.directory(checkpoint_id)
        if self._shelf.health(checkpoint_id).quarantined:
            raise BadRequest("it is quarantined")
        if checkpoint.platform.gpu:
            raise BadRequest("it has device memory, which does not travel")
        if lease is None:
            self._prove()
            self._publish_without_lease(checkpoint, directory)
            return
        log.info("upload of %s begins", checkpoint_id)
        began = time.monotonic()
        progress = self._uploads.setdefault(checkpoint_id, Progress())
        held = directory / "held"
        _write_root(directory)
        manifest = self._region.publish(
            lease,
            LocalCheckpoint(
                app=checkpoint.app,
                build=checkpoint.build_id,
                platform=checkpoint.platform.key,
                images=directory / "images",
                files=held if held.is_dir() and any(held.iterdir()) else None,
                companions=[directory / shelves.RECORD, directory / _ROOT],
                facts=dataclasses.asdict(checkpoint),
                layers=self._layers_of(checkpoint.build_id),
            ),
            progress,
        )
        log.info(
            "%s is published as %s in %.1f s: %s", checkpoint_id, manifest.name.id, _since(began), progress
        )
        self._mark(directory, manifest.name)
        self._publish_learned(manifest, directory)

    def _publish_without_lease(self, checkpoint: Checkpoint, directory: Path) -> None:
        """An upload that an earlier run of this node left, or that failed: is it there, may it be made?"""
        build_id, key = checkpoint.build_id, checkpoint.platform.key
        if reason := self._foreign.get(build_id):
            raise BadRequest(f"the region's own is refused here: {reason}")
        for name in self._region.names(build_id):
            if name.platform == key and name.id not in self._refused:
                manifest = self._manifest(name)
                if manifest.facts.get("checkpoint_id") == checkpoint.checkpoint_id:
                    self._mark(directory, name)
                    self._publish_learned(manifest, directory)
                    return
                raise BadRequest(f"the region has {name.id} for its build")
        with self._region.lease(checkpoint.app, build_id, key).kept() as lease:
            self._publish_once(checkpoint.checkpoint_id, lease)

    # --- what is learned --------------------------------------------------------------------------

    def learned(self, checkpoint_id: str) -> None:
        """A restore has learned: publish that where it is news. In the background."""
        self.spawn(asyncio.to_thread(self._learned, checkpoint_id))

    def _learned(self, checkpoint_id: str) -> None:
        name = self.published(checkpoint_id)
        if name is None:
            return
        try:
            self._publish_learned(self._manifest(name), self._shelf.directory(checkpoint_id))
        except RelumeError as error:
            log.warning("the working set of %s is not published: %s", checkpoint_id, error.message)

    def _publish_learned(self, manifest: Manifest, directory: Path) -> None:
        images = directory / "images"
        learned, _ = working_set.load(directory / "working-set", _image_sizes(images))
        if learned is None or not learned.pieces:
            return
        before = _read_mark(directory).get("working_set_bytes")
        if before is not None and abs(learned.total - before) <= _PUBLISH_AGAIN * max(before, 1):
            return
        number = self._region.publish_working_set(manifest, _runs(images, learned), read_from_files(images))
        self._mark(directory, manifest.name, working_set_bytes=learned.total)
        log.info("working set %d of %s is published: %d bytes", number, manifest.name.id, learned.total)

    # --- using ------------------------------------------------------------------------------------

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
        counters = self._starts.counters
        bytes_before, requests_before = counters.bytes_read, counters.requests
        manifest = self._find_manifest(build.build_id, self._starts)
        if manifest is None:
            return None, None
        name = manifest.name
        if name.id in self._refused:
            return f"checkpoint {name.id} of the region is quarantined: {self._refused[name.id]}", None
        if manifest.layers != tuple(layer.digest for layer in build.layers):
            return f"checkpoint {name.id} of the region was taken on other layers", None
        try:
            fetched = self._starts.fetch(name)
        except Untrusted as error:
            self._refuse(name, error.message)
            raise
        try:
            checkpoint = _checkpoint_of(fetched, build)
            _settle(fetched.directory)
            self._lay_working_set(fetched)
        except BaseException:
            fetched.close()
            raise
        remote = Remote(
            url=self._settings.url,
            key_file=str(self._settings.key_file) if self._settings.key_file else None,
            state=str(self._state),
            node=self._node_id,
            cache_bytes=self._settings.cache_bytes,
            build=name.build,
            platform=name.platform,
            generation=name.generation,
        )
        return None, Copy(
            checkpoint,
            fetched,
            dataclasses.asdict(remote),
            counters.bytes_read - bytes_before,
            counters.requests - requests_before,
        )

    def look(self, build: Build) -> tuple[str | None, str | None]:
        """What :meth:`find` would find, fetching nothing: (reason, checkpoint id). Blocking."""
        try:
            manifest = self._find_manifest(build.build_id, self._starts)
        except RelumeError as error:
            return f"the region's store: {error.message}", None
        if manifest is None:
            return None, None
        if manifest.name.id in self._refused:
            return f"the region's is quarantined: {self._refused[manifest.name.id]}", None
        return None, str(manifest.facts.get("checkpoint_id", manifest.name.id))

    def _find_manifest(self, build_id: str, region: Region) -> Manifest | None:
        """Raises Untrusted for one that this node must not use, and remembers why."""
        try:
            found = region.find(build_id, self._platform.key, self._fits)
        except Untrusted as error:
            self._foreign[build_id] = error.message
            with contextlib.suppress(StoreError):
                for name in region.names(build_id):
                    if name.platform == self._platform.key:
                        self._refuse(name, error.message)
            raise
        self._foreign.pop(build_id, None)
        return found

    def _fits(self, manifest: Manifest) -> bool:
        try:
            return not differences(Platform.from_json(manifest.facts["platform"]), self._platform)
        except (KeyError, TypeError):
            return False

    def finish(self, copy: Copy) -> None:
        """The instance needs the store no more: bring the rest, so that the next start is local. In the background."""
        self.spawn(asyncio.to_thread(self.finish_now, copy))

    def finish_now(self, copy: Copy) -> None:
        """As :meth:`finish`, at once; blocking. Raises nothing."""
        name = copy.fetched.manifest.name
        try:
            if self._starts.fill(copy.fetched):
                self._link(copy.directory)
                log.info("%s is whole on this node", name.id)
                self._publish_learned(copy.fetched.manifest, copy.directory)
        except Untrusted as error:
            self._refuse(name, error.message)
        except (RelumeError, OSError) as error:
            log.warning("the rest of %s did not come: %s", name.id, error)
        finally:
            copy.fetched.close()

    def complete(self, copy: Copy) -> Copy:
        """All of it, before a restore that reads everything. Blocking. Raises StoreError, Untrusted, OSError."""
        self._starts.fill(copy.fetched)
        return dataclasses.replace(copy, fetched=dataclasses.replace(copy.fetched, complete=True))

    def failed(self, copy: Copy, error: Exception) -> bool:
        """A restore from ``copy`` failed; whether it counts as damaged from now on. Ends the copy."""
        name = copy.fetched.manifest.name
        copy.fetched.close()
        log.warning("restore of %s failed: %s", name.id, error)
        if isinstance(error, Untrusted):
            self._refuse(name, error.message)
            return True
        if not isinstance(error, StoreError):
            self._failures[name.id] = self._failures.get(name.id, 0) + 1
            if self._failures[name.id] >= _ENGINE_FAILURES:
                self._refuse(name, str(error))
                return True
        return False

    def _refuse(self, name: CheckpointName, reason: str) -> None:
        log.warning("%s is quarantined here: %s", name.id, reason)
        self._refused[name.id] = reason
        self._region.cache.evict(name.id)

    def _lay_working_set(self, fetched: Fetched) -> None:
        """What the region learned, as the pager reads it; what this node learned since is kept."""
        file = fetched.directory / "working-set"
        if file.exists() or fetched.pages.working_set is None:
            return
        sizes = _image_sizes(fetched.images)
        pieces = tuple(
            Piece(number, run.first * PAGE_SIZE, run.pages * PAGE_SIZE)
            for run in fetched.pages.working_set
            if (number := _pages_id(run.stream)) in sizes
        )
        learned = WorkingSet(sizes, pieces)
        working_set.save(file, learned)
        self._mark(fetched.directory, fetched.manifest.name, working_set_bytes=learned.total)

    # --- prefetch ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """``[region] prefetch``: what is new in the store is here before it is asked for."""
        known: set[CheckpointName] = set()
        while True:
            try:
                for name in await asyncio.to_thread(self._region.names):
                    if name not in known and name.platform == self._platform.key:
                        known.add(name)
                        await asyncio.to_thread(self._prefetch, name)
            except (RelumeError, OSError) as error:
                log.warning("prefetch: %s", error)
            await asyncio.sleep(_WATCH_S)

    def _prefetch(self, name: CheckpointName) -> None:
        try:
            manifest = self._manifest(name)
            if manifest.node != self._node_id:
                self._region.prefetch(name)
                log.info("prefetched %s", name.id)
        except Untrusted as error:
            self._refuse(name, error.message)

    # --- looking after them -----------------------------------------------------------------------

    def progress(self, checkpoint_id: str) -> str | None:
        """How far its upload is; None when none goes on."""
        progress = self._uploads.get(checkpoint_id)
        return None if progress is None else str(progress) if progress.total else "waiting"

    def published(self, checkpoint_id: str) -> CheckpointName | None:
        """The name in the store of a checkpoint that lies here."""
        directory = self._shelf.directory(checkpoint_id)
        found = _read_mark(directory)
        if "build" in found:
            return CheckpointName(found["build"], found["platform"], found["generation"])
        return None

    def rows(self, here: Iterable[str]) -> list[dict[str, Any]]:
        """Rows of ``checkpoints ls`` for what is not whole on this node. Blocking; a store that is gone has none."""
        known = set(here)
        partial = {entry.id for entry in self._region.cache.entries() if not entry.complete}
        rows = []
        try:
            names = self._starts.names()
        except StoreError as error:
            log.warning("checkpoints of the region: %s", error.message)
            return []
        for name in names:
            try:
                manifest = self._manifest(name)
            except StoreError as error:
                self._manifests.pop(name, None)
                rows.append(_row(name, None, f"refused: {error.message}", ["remote"]))
                continue
            if manifest.facts.get("checkpoint_id") in known:
                continue
            state = "quarantined" if name.id in self._refused else "ready"
            rows.append(
                _row(name, manifest, state, ["partial", "remote"] if name.id in partial else ["remote"])
            )
        return rows

    def inspect(self, checkpoint_id: str) -> dict[str, Any]:
        """``checkpoints inspect``: what the store knows of it. Raises NotFound, StoreError. Blocking."""
        manifest = self.resolve(checkpoint_id)
        name = manifest.name
        reasons = (
            [] if self._fits(manifest) else ["it was taken on a platform that does not fit this machine"]
        )
        if name.id in self._refused:
            reasons.append(f"quarantined: {self._refused[name.id]}")
        return _row(name, manifest, "quarantined" if name.id in self._refused else "ready", ["remote"]) | {
            "region": {
                "name": name.id,
                "node": manifest.node,
                "signed_in_epoch": manifest.epoch,
                "plain_bytes": manifest.sizes.plain,
                "data_bytes": manifest.sizes.data,
                "stored_bytes": manifest.sizes.stored,
                "new_stored_bytes": manifest.sizes.new_stored,
                "shared_percent": round(manifest.sizes.shared_percent, 1),
            },
            "processes": manifest.facts.get("processes", []),
            "would_be_used": not reasons,
            "why_not": reasons,
        }

    def resolve(self, checkpoint_id: str) -> Manifest:
        """The manifest of the checkpoint with this id, or with this name in the store. Raises NotFound. Blocking."""
        for name in self._region.names():
            with contextlib.suppress(Untrusted):
                manifest = self._manifest(name)
                if checkpoint_id in (name.id, manifest.facts.get("checkpoint_id")):
                    return manifest
        raise NotFound(
            f"no checkpoint {checkpoint_id} in the region that this node can read",
            hint="relume checkpoints ls shows them",
        )

    def pull(self, checkpoint_id: str) -> dict[str, Any]:
        """All of it onto this node. Raises NotFound, StoreError. Blocking."""
        manifest = self.resolve(checkpoint_id)
        fetched = self._region.fetch(manifest.name)
        try:
            _settle(fetched.directory)
            self._lay_working_set(fetched)
            fetched.pages.prefetch()
            self._region.fill(fetched)
            self._link(fetched.directory)
        finally:
            fetched.close()
        return {"checkpoint_id": checkpoint_id, "name": manifest.name.id, "data_bytes": manifest.sizes.data}

    def verify(self, checkpoint_id: str) -> dict[str, Any]:
        """Read every object of it in the store. Raises NotFound, StoreError. Blocking."""
        verdict = self._region.verify(self.resolve(checkpoint_id).name)
        return {
            "checkpoint_id": checkpoint_id,
            "ok": verdict.clean,
            "objects": verdict.objects,
            "bytes": verdict.bytes,
            "problems": list(verdict.problems),
        }

    def remove(self, checkpoint_id: str) -> bool:
        """Take it out of sight in the whole region; False when it is not there. Raises StoreError. Blocking."""
        try:
            name = self.published(checkpoint_id) or self.resolve(checkpoint_id).name
        except NotFound:
            return False
        self._region.remove(name)
        self._shelf.unlink(checkpoint_id)
        return True

    def remove_app(self, app: str) -> None:
        """Remove every checkpoint of an app from the region. Raises StoreError. Blocking."""
        self._region.remove_app(app)

    def collect(self, *, delete: bool) -> dict[str, Any]:
        """Garbage collection. Raises Conflict, StoreError. Blocking."""
        return dataclasses.asdict(self._region.collect(dry_run=not delete))

    def export(self, checkpoint_id: str, path: Path) -> dict[str, Any]:
        """One file with all of it. Raises NotFound, StoreError. Blocking."""
        self._region.export(self.resolve(checkpoint_id).name, path)
        return {"checkpoint_id": checkpoint_id, "file": str(path), "bytes": path.stat().st_size}

    def import_(self, path: Path) -> dict[str, Any]:
        """What :meth:`export` wrote, into the store. Raises StoreError, NotFound. Blocking."""
        try:
            with path.open("rb") as file:
                name = self._region.import_(file)
        except FileNotFoundError:
            raise NotFound(f"no file {path}") from None
        return {
            "file": str(path),
            "name": name.id,
            "checkpoint_id": self._manifest(name).facts.get("checkpoint_id"),
        }

    # --- pieces -----------------------------------------------------------------------------------

    def _manifest(self, name: CheckpointName) -> Manifest:
        """It never changes, so it is read once."""
        if name not in self._manifests:
            self._manifests[name] = self._region.manifest(name)
        return self._manifests[name]

    def _link(self, directory: Path) -> None:
        try:
            _settle(directory)
            checkpoint = shelves.read(directory)
        except (OSError, ValueError, TypeError, KeyError, Untrusted) as error:
            log.warning("%s in the cache is no checkpoint: %s", directory.name, error)
            return
        build, platform, generation = directory.name.rsplit(".", 2)
        self._mark(directory, CheckpointName(build, platform, int(generation)))
        self._shelf.link(checkpoint.checkpoint_id, directory)

    def _is_own(self, checkpoint_id: str) -> bool:
        return self._shelf.directory(checkpoint_id).parent == self._shelf.root

    @staticmethod
    def _mark(directory: Path, name: CheckpointName, **more: Any) -> None:
        """Remember in the checkpoint's folder that it is published; losing that costs a look at the store."""
        found = _read_mark(directory) | dataclasses.asdict(name) | more
        temporary = directory / f".{_MARK}"
        temporary.write_text(json.dumps(found))
        temporary.rename(directory / _MARK)


def _read_mark(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / _MARK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_root(directory: Path) -> None:
    found = (directory / "held").stat()
    root = {
        "mode": stat.S_IMODE(found.st_mode),
        "uid": found.st_uid,
        "gid": found.st_gid,
        "mtime_ns": found.st_mtime_ns,
    }
    (directory / _ROOT).write_text(json.dumps(root))


def _settle(directory: Path) -> None:
    """Make what was fetched like what a dump leaves. Raises Untrusted, OSError."""
    shelves.close_to_others(directory / "images")
    held = directory / "held"
    held.mkdir(mode=0o700, exist_ok=True)  # none is sent where it is empty
    try:
        root = json.loads((directory / _ROOT).read_text())
        os.chown(held, root["uid"], root["gid"])
        held.chmod(root["mode"] & 0o7777)
        os.utime(held, ns=(root["mtime_ns"], root["mtime_ns"]))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise Untrusted(f"{directory.name} has no usable {_ROOT}: {error}") from None


def _checkpoint_of(fetched: Fetched, build: Build) -> Checkpoint:
    """The record that came along. Raises Untrusted unless it is that of this build and fits the images' manifest."""
    name = fetched.manifest.name
    try:
        checkpoint = shelves.read(fetched.directory)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Untrusted(f"{name.id} has no usable {shelves.RECORD}: {error}") from None
    if (checkpoint.app, checkpoint.build_id) != (build.app, build.build_id) or name.build != build.build_id:
        raise Untrusted(f"{name.id} holds the checkpoint of another build, {checkpoint.build_id}")
    return checkpoint


def _image_sizes(images: Path) -> dict[int, int]:
    """As the pager counts them: bytes of each pages file, by its number."""
    return {pagemap.pages_id: pagemap.pages_bytes for pagemap in _pagemaps(images)}


def _runs(images: Path, learned: WorkingSet) -> list[PageRun]:
    """What a start needs, in order and each page once: what CRIU reads itself, then what the app touched."""
    criu = [
        Piece(pagemap.pages_id, extent.offset, extent.length)
        for pagemap in _pagemaps(images)
        for extent in pagemap.extents
        if not extent.lazy
    ]
    return [
        PageRun(f"pages-{piece.pages_id}.img", piece.offset // PAGE_SIZE, piece.length // PAGE_SIZE)
        for piece in working_set.refine((), (), [*criu, *learned.pieces])
    ]


def _pagemaps(images: Path) -> list[Pagemap]:
    pids = [task.pid for task in read_image(images / "pstree.img")]
    return [read_pagemap(images, pid) for pid in pids if (images / f"pagemap-{pid}.img").exists()]


def _pages_id(stream: str) -> int:
    number = stream.removeprefix("pages-").removesuffix(".img")
    return int(number) if number.isdecimal() else -1


def _row(name: CheckpointName, manifest: Manifest | None, state: str, where: list[str]) -> dict[str, Any]:
    facts = manifest.facts if manifest else {}
    return {
        "checkpoint_id": facts.get("checkpoint_id", name.id),
        "app": manifest.app if manifest else None,
        "build_id": name.build,
        "state": state,
        "where": where,
        "upload": None,
        "size_bytes": facts.get("size_bytes", 0),
        "created_at": manifest.created_at if manifest else None,
    }


def _since(began: float) -> float:
    return time.monotonic() - began
