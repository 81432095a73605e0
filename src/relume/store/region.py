"""The region as a node sees it: one store, the keys, the leases, the cache. The room's front door.

Everything here blocks and is safe to call from several threads; an asyncio caller uses `asyncio.to_thread`.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

from relume.errors import ObjectMissing, Superseded, Untrusted
from relume.store import archive, builds, gc, layers
from relume.store.builds import BuildRecord, LayerRef
from relume.store.cache import Cache
from relume.store.exclusive import prove_exclusive
from relume.store.fetch import Fetched, fetch, fill
from relume.store.keys import Keyring, KeyWrapper, load_own_key, load_region_key
from relume.store.layers import LAYERS
from relume.store.lease import LEASE_SECONDS, Lease, Leases
from relume.store.manifest import Manifest, read_manifest
from relume.store.names import CheckpointName, lease
from relume.store.objects import Counters, Objects, Patience
from relume.store.publish import LocalCheckpoint, publish, wait_for_sweep
from relume.store.seen import Seen
from relume.store.upload import Limits, Progress
from relume.store.verify import Verdict, verify
from relume.store.working_set import PageRun, publish_working_set

_BUILD = "build"  # stands for the platform in the lease of a build


@dataclass(frozen=True, slots=True)
class RegionConfig:
    """`[store]` and `[region]` of node.toml. `cache_bytes` bounds the node's cache on disk."""

    url: str
    key_file: Path | None = None
    cache_bytes: int = 50_000_000_000
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    lease_s: float = LEASE_SECONDS
    grace_s: float = gc.GRACE_SECONDS


class Region:
    """Open one per process. `state` is a directory of this node: its own key, the cache, what it has seen."""

    def __init__(
        self, config: RegionConfig, state: Path, node: str, *, kms: KeyWrapper | None = None
    ) -> None:
        """Raises ConfigError for a URL or key file that will not do. Talks to nobody yet."""
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.config = config
        self.node = node
        self.objects = Objects(config.url, patience=config.patience)
        self.keyring = Keyring(load_own_key(state / "node.key"), load_region_key(config.key_file), kms=kms)
        self.leases = Leases(self.objects, node, seconds=config.lease_s)
        self.cache = Cache(state / "cache", config.cache_bytes)
        self._seen = Seen(state / "seen.json")
        self._scratch = state / "scratch"
        self._scratch.mkdir(mode=0o700, exist_ok=True)

    def with_patience(self, patience: Patience) -> Region:
        """The same region for somebody with other patience, with counters of its own."""
        other = copy(self)
        other.config = replace(self.config, patience=patience)
        other.objects = Objects(self.config.url, patience=patience)
        other.leases = self.leases.through(other.objects)
        return other

    @property
    def counters(self) -> Counters:
        """Requests and bytes so far, for a start's trace."""
        return self.objects.counters

    def prove(self) -> None:
        """At the node's start: refuse a store whose create-if-absent does not exclude. Raises StoreError."""
        prove_exclusive(self.objects)

    def sweep(self) -> None:
        """At the node's start, under the lock of its state: clean what a crash left half made."""
        self.cache.sweep()
        for left in self._scratch.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    # Making a checkpoint

    def lease(self, app: str, build: str, platform: str) -> Lease:
        """Take the right to make the checkpoint; use it as `with region.lease(...).kept() as lease`.

        Raises Conflict (`reason` in its details is `in_progress`) while another instance anywhere is at it.
        """
        seen = self._seen.newest(build, platform)  # of a bucket that was emptied since, perhaps
        return self.leases.acquire(lease(build, platform), above=seen, tenant=app)

    def publish(
        self,
        lease: Lease,
        source: LocalCheckpoint,
        progress: Progress | None = None,
        *,
        mend: bool = False,
    ) -> Manifest:
        """Upload and publish. After a failure try again under a new lease: only what is missing is sent.

        With `mend` all of it is sent, in the place of what the store has and may be damaged. Raises Superseded,
        StoreError.
        """
        manifest = publish(
            self.objects,
            self.keyring,
            self.leases,
            lease,
            source,
            node=self.node,
            limits=self.config.limits,
            progress=progress or Progress(),
            scratch=self._scratch,
            mend=mend,
        )
        self._seen.accept(manifest.name)
        return manifest

    def publish_working_set(
        self, manifest: Manifest, runs: Iterable[PageRun], read: Callable[[PageRun], bytes]
    ) -> int:
        """Publish what was learned: `runs` in touch order, no page twice; returns the number it got.

        `read` gives their pages: `read_from_files(images)` for a checkpoint that is whole on this disk, else
        `Fetched.pages.read`, which fetches what is missing. Raises StoreError.
        """
        return publish_working_set(self.objects, self.keyring, manifest.app, manifest.name, runs, read)

    # Using one

    def find(
        self, build: str, platform: str, fits: Callable[[Manifest], bool] = lambda _: False
    ) -> Manifest | None:
        """The newest checkpoint of a build for a platform key, else for another one that `fits`; None without one.

        Raises Untrusted for one that is forged, foreign, or older than one seen before: boot cold and say why.
        """
        names = self.names(build)
        for name in sorted(names, key=lambda name: name.platform != platform):
            manifest = self.manifest(name)
            if name.platform == platform or fits(manifest):
                self._seen.accept(name)
                return manifest
        return None

    def platforms(self, build: str) -> list[str]:
        """The platform keys for which the store has checkpoints of a build."""
        return sorted({name.platform for name in self.names(build)})

    def fetch(self, name: CheckpointName) -> Fetched:
        """What a restore needs to begin; pages follow through `Fetched.pages`. Raises Untrusted, StoreError."""
        return fetch(self.objects, self.keyring, self.cache, name)

    def fill(self, fetched: Fetched, parallel: int = 4) -> bool:
        """The rest behind the first answer; True when the next start is local."""
        return fill(fetched, self.cache, parallel)

    def prefetch(self, name: CheckpointName) -> None:
        """Fetch what a start begins with, and the working set: the first start is then local up to its first answer."""
        fetched = self.fetch(name)
        try:
            fetched.pages.prefetch()
        finally:
            fetched.close()

    def pull(self, name: CheckpointName) -> None:
        """Fetch all of a checkpoint into the cache. In chunks only: the working set's pages are in them too."""
        fetched = self.fetch(name)
        try:
            self.fill(fetched, self.config.limits.parallel)
        finally:
            fetched.close()

    # Looking after them

    def names(self, build: str = "") -> list[CheckpointName]:
        """The newest visible checkpoint of every build (or of one) and platform."""
        newest: dict[tuple[str, str], CheckpointName] = {}
        gone: set[CheckpointName] = set()
        infos = self.objects.list(f"checkpoint/{build}" if build else "checkpoint")
        for info in infos:
            if (name := CheckpointName.parse(info.name)) is not None and info.name == name.removed:
                gone.add(name)
        for info in infos:
            name = CheckpointName.parse(info.name)
            if name is not None and info.name == name.manifest and name not in gone:
                key = (name.build, name.platform)
                newest[key] = max(name, newest.get(key, name))
        return sorted(newest.values())

    def standing(self, name: CheckpointName) -> Literal["current", "removed", "superseded", "missing"]:
        """Of a checkpoint that a node has: may it still be used? One request. Raises StoreError."""
        infos = {info.name for info in self.objects.list(f"checkpoint/{name.build}/{name.platform}")}
        if name.removed in infos:
            return "removed"
        if name.manifest not in infos:
            return "missing"
        newest = max(
            found for each in infos if (found := CheckpointName.parse(each)) and found.manifest in infos
        )
        return "superseded" if newest > name and newest.removed not in infos else "current"

    def manifest(self, name: CheckpointName) -> Manifest:
        """Raises ObjectMissing, Untrusted, StoreError."""
        return read_manifest(self.objects, self.keyring, name)[0]

    def working_set_bytes(self, name: CheckpointName) -> int:
        """What the newest working set of a checkpoint takes in the store; 0 without one. Raises StoreError."""
        found: dict[int, int] = defaultdict(int)
        for info in self.objects.list(name.working_sets):
            found[int(info.name.split("/")[-2])] += info.size
        return found[max(found)] if found else 0

    def verify(self, name: CheckpointName) -> Verdict:
        return verify(self.objects, self.keyring, name)

    def remove(self, name: CheckpointName) -> None:
        """Out of sight at once, here and in the cache; the bytes go with a collection after the grace period."""
        gc.remove(self.objects, name)
        self.cache.evict(name.id)

    def collect(self, *, dry_run: bool = True) -> gc.Report:
        """Garbage collection. Raises Conflict, StoreError, Untrusted (see gc)."""
        return gc.collect(
            self.objects, self.keyring, self.leases, grace_s=self.config.grace_s, dry_run=dry_run
        )

    def export(self, name: CheckpointName, path: Path) -> None:
        archive.export_file(self.objects, self.keyring, name, path)

    def import_(self, file: BinaryIO) -> CheckpointName:
        return archive.import_(self.objects, self.keyring, self.leases, file)

    def remove_app(self, app: str) -> list[CheckpointName]:
        """Remove every checkpoint of an app."""
        return self.retain(app, keep=0)

    def retain(self, app: str, *, keep: int, max_age_s: float | None = None) -> list[CheckpointName]:
        """Remove an app's checkpoints but the `keep` newest, and those older than `max_age_s`; returns them.

        Age is by the time stamps of the manifests' makers, so it is as right as their clocks: give days, not minutes.
        """
        own = []
        for name in self.names():
            with suppress(ObjectMissing, Untrusted):  # not ours to judge
                if (manifest := self.manifest(name)).app == app:
                    own.append(manifest)
        own.sort(key=lambda manifest: manifest.created_at, reverse=True)
        too_old = time.time() - max_age_s if max_age_s is not None else float("-inf")
        doomed = [m.name for at, m in enumerate(own) if at >= keep or m.created_at < too_old]
        for name in doomed:
            self.remove(name)
        return doomed

    # Builds

    def find_build(self, app: str, inputs: str) -> BuildRecord | None:
        """The newest build of these inputs. Raises Untrusted, also for one older than one seen before; StoreError."""
        found = builds.find_build(self.objects, self.keyring, app, inputs)
        if found is not None:
            self._seen.accept(CheckpointName(inputs, _BUILD, found.number))
        return found

    def build_lease(self, inputs: str) -> Lease:
        """The right to make and publish the build of these inputs; used as that of a checkpoint. Raises Conflict."""
        seen = self._seen.newest(inputs, _BUILD)
        return self.leases.acquire(lease(inputs, _BUILD), above=seen, tenant=LAYERS)

    def is_building(self, inputs: str) -> bool:
        """Does another node hold that right, as far as can be told?"""
        return self.leases.is_alive(lease(inputs, _BUILD))

    def publish_build(
        self,
        held: Lease,
        app: str,
        inputs: str,
        facts: dict[str, Any],
        digests: Sequence[str],
        pack: Callable[[str, Path], None],
        progress: Progress | None = None,
        *,
        mend: bool = False,
    ) -> BuildRecord:
        """Upload what the store lacks of the layers (`pack` writes one into a file), and then the build.

        With `mend` all of them, in the place of what the store has and may be damaged. Raises Superseded when `held`
        was lost, StoreError, OSError; then nothing became visible.
        """
        wait_for_sweep(self.leases, held)
        refs = []
        with TemporaryDirectory(dir=self._scratch, prefix="build-") as scratch:
            for digest in digests:
                size = layers.publish_layer(
                    self.objects,
                    self.keyring,
                    digest,
                    partial(pack, digest),
                    Path(scratch),
                    limits=self.config.limits,
                    progress=progress or Progress(),
                    check=held.check,
                    mend=mend,
                )
                refs.append(LayerRef(digest=digest, size=size))
        build = BuildRecord(app=app, inputs=inputs, number=held.number, facts=facts, layers=tuple(refs))
        held.check()
        if not builds.publish_build(self.objects, self.keyring, build):
            raise Superseded(f"the build {held.number} of {inputs} is in the store already")
        self._seen.accept(CheckpointName(inputs, _BUILD, build.number))
        return build

    def fetch_layer(self, digest: str, file: Path) -> None:
        layers.fetch_layer(self.objects, self.keyring, digest, file, parallel=self.config.limits.parallel)

    def builds(self, app: str) -> list[BuildRecord]:
        """Every build of an app that can be read, oldest first. Raises StoreError."""
        found = []
        infos = builds.list_builds(self.objects, self.keyring, app)
        for info in sorted(infos, key=lambda info: info.modified):
            with suppress(ObjectMissing, Untrusted):
                found.append(builds.read_build(self.objects, self.keyring, info.name, app))
        return found

    def remove_builds(self, app: str, chosen: Callable[[BuildRecord], bool] = lambda _: True) -> int:
        """Forget an app's builds, those that cannot be read too when all go; returns how many.

        Their layers go with a collection unless another build or a checkpoint names them. Raises StoreError.
        """
        removed = 0
        for info in builds.list_builds(self.objects, self.keyring, app):
            try:
                doomed = chosen(builds.read_build(self.objects, self.keyring, info.name, app))
            except ObjectMissing:
                continue
            except Untrusted:
                doomed = False
            if doomed:
                self.objects.delete(info.name)
                removed += 1
        return removed
