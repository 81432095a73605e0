"""Garbage collection: mark and sweep, with a grace period, safe beside uploads that go on.

A chunk may be deleted when no manifest names it, it is older than the grace period, and nobody may be about to
name it. The last is the hard part, because an uploader that finds a chunk in the store does not send it again.
So sweeping and uploading one tenant's chunks exclude each other, each by first writing its own mark and then
looking for the other's:

- a sweeper takes the lease `sweep`, then looks at every other lease: the tenants of those that are alive are
  left alone this time;
- an uploader takes its lease, then waits while a sweep is alive.

Either the sweeper sees the uploader's lease or the uploader sees the sweeper's. An uploader that was called dead
and wakes up finds its generation *closed*: the sweeper creates a manifest of that name first, which is no
manifest, and of two creators only one wins. A sweeper that cannot renew its lease stops before the next deletion.

A layer goes when no build and no checkpoint names it; a build when one made anew of the same inputs has replaced
it. A removed checkpoint stays whole for the grace period, for those that still page from it; then its manifest
goes first and the rest after it. All ages are differences between time stamps of the store itself: no node's clock
is involved.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from relume.errors import ObjectMissing, StoreError
from relume.store import faults, index
from relume.store.builds import BuildRecord, build_number
from relume.store.chunks import Tenant
from relume.store.envelope import Kind, stored_limit, unseal, unseal_signed
from relume.store.keys import Keyring
from relume.store.layers import LAYERS
from relume.store.lease import Lease, Leases, Standing
from relume.store.manifest import read_manifest, read_signed
from relume.store.names import CheckpointName
from relume.store.objects import ObjectInfo, Objects
from relume.store.publish import SWEEP

GRACE_SECONDS = 24 * 3600.0
_ANY = "*"  # a live lease that does not say whose chunks it is about
_CLOSED = b"closed by garbage collection\n"


@dataclass(slots=True)
class Report:
    """What a collection deleted, or would have with `dry_run`. `busy` are the ids of tenants left alone."""

    dry_run: bool
    checkpoints: list[str] = field(default_factory=list)
    chunks: int = 0
    objects: int = 0
    bytes: int = 0
    busy: list[str] = field(default_factory=list)


def remove(objects: Objects, name: CheckpointName) -> None:
    """Take a checkpoint and all earlier generations out of sight; `collect` deletes them later. Raises StoreError."""
    for info in objects.list(f"checkpoint/{name.build}/{name.platform}"):
        found = CheckpointName.parse(info.name)
        if found is not None and info.name == found.manifest and found.generation <= name.generation:
            objects.create(found.removed, b"removed\n")


def collect(
    objects: Objects,
    keyring: Keyring,
    leases: Leases,
    *,
    grace_s: float = GRACE_SECONDS,
    dry_run: bool = True,
) -> Report:
    """One collection. Raises Conflict when another one is going on, StoreError, and Untrusted for a manifest that
    cannot be read: what it names is unknown, so nothing may be deleted."""
    lease = leases.acquire(SWEEP)
    with lease.kept():
        return _Collection(objects, keyring, leases, lease, grace_s, dry_run).run()


class _Collection:
    def __init__(
        self, objects: Objects, keyring: Keyring, leases: Leases, lease: Lease, grace_s: float, dry_run: bool
    ) -> None:
        self._objects = objects
        self._keyring = keyring
        self._leases = leases
        self._lease = lease
        self._grace_s = grace_s
        self._report = Report(dry_run)
        self._gone: set[str] = set()
        """Builds that were deleted, or would have been."""

    def run(self) -> Report:
        old = self._store_time() - self._grace_s
        busy = self._busy_tenants(old)
        self._report.busy = sorted(busy)
        if _ANY in busy:
            return self._report
        self._sweep_checkpoints(old)
        self._sweep_builds(old)
        chunks, layers = self._mark()
        known = {epoch.id.hex() for epoch in self._keyring.epochs}
        for info in [*self._objects.list("layer"), *self._objects.list("chunk")]:
            kind, epoch, tenant, last = info.name.split("/")
            if epoch not in known or tenant in busy or info.modified >= old:
                continue
            if kind == "chunk" and info.name not in chunks:
                self._delete(info, "gc.chunk")
                self._report.chunks += 1
            elif kind == "layer" and last not in layers:
                self._delete(info, "gc.object")  # its chunks go with the next collection
        return self._report

    def _store_time(self) -> float:
        """Now, by the store's clock: the time stamp of an object made now."""
        name = f"probe/{secrets.token_hex(16)}"
        self._objects.create(name, name.encode())
        try:
            return next(info.modified for info in self._objects.list("probe") if info.name == name)
        finally:
            self._objects.delete(name)

    def _busy_tenants(self, old: float) -> set[str]:
        """The ids of tenants with an upload that may be alive. Generations of dead ones are closed.

        Of each lease only the highest number is kept: it says where to go on.
        """
        series: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in self._objects.list("lease"):
            series[info.name.rsplit("/", 2)[0]].append(info)
        busy: set[str] = set()
        for prefix, infos in series.items():
            standing = Standing.of([info.name.removeprefix(f"{prefix}/") for info in infos])
            if not standing.done and self._leases.is_alive(prefix):
                tenant = self._leases.facts(prefix, standing.number).get("tenant")
                busy |= {Tenant(epoch, tenant).id for epoch in self._keyring.epochs} if tenant else {_ANY}
            elif not standing.done and not self._report.dry_run:
                self._close(prefix, standing.number)
            past = [info for info in infos if not info.name.startswith(f"{prefix}/{standing.number}/")]
            self._delete_old(past, old)
        return busy

    def _close(self, prefix: str, number: int) -> None:
        """Make sure that the dead owner of this lease can never publish under it, then call the lease done."""
        _, build, platform = prefix.split("/")
        name = CheckpointName(build, platform, number)
        if self._objects.create(name.manifest, _CLOSED):
            self._objects.create(name.removed, b"removed\n")
        self._leases.write(f"{prefix}/{number}/done", {})

    def _sweep_checkpoints(self, old: float) -> None:
        """Delete removed checkpoints, what unfinished uploads left, and working sets that a newer one replaced."""
        groups: dict[CheckpointName, list[ObjectInfo]] = defaultdict(list)
        for info in self._objects.list("checkpoint"):
            if (name := CheckpointName.parse(info.name)) is not None:
                groups[name].append(info)
        working_sets: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in self._objects.list("working-set"):
            working_sets[info.name.rsplit("/", 2)[0]].append(info)
        for name, infos in groups.items():
            sets = working_sets.pop(name.working_sets, [])
            names = {info.name: info for info in infos}
            if name.manifest in names and name.removed not in names:
                lists = [int(info.name.split("/")[-2]) for info in sets if info.name.endswith("/list")]
                current = f"{name.working_sets}/{max(lists, default=0)}/"
                self._delete_old([info for info in sets if not info.name.startswith(current)], old)
            elif max(info.modified for info in infos) < old and not self._leases.is_alive(name.lease):
                if (manifest := names.pop(name.manifest, None)) is not None:
                    self._delete(manifest, "gc.manifest")
                removed = names.pop(name.removed, None)
                for info in [
                    *names.values(),
                    *sets,
                    *([removed] if removed else []),
                ]:  # the mark last: to go on by
                    self._delete(info, "gc.object")
                self._report.checkpoints.append(name.id)
        for orphans in working_sets.values():
            self._delete_old(orphans, old)

    def _sweep_builds(self, old: float) -> None:
        """Delete builds that one made anew of the same inputs has replaced: nobody adopts them any more."""
        series: dict[str, list[ObjectInfo]] = defaultdict(list)
        for info in self._objects.list("build"):
            if build_number(info.name) is not None:
                series[info.name.rsplit("/", 1)[0]].append(info)
        for infos in series.values():
            infos.sort(key=lambda info: build_number(info.name) or 0)
            replaced = infos[:-1] if infos[-1].modified < old else []
            self._delete_old(replaced, old)
            self._gone |= {info.name for info in replaced if info.modified < old}

    def _mark(self) -> tuple[set[str], set[str]]:
        """The names of all chunks, and the digests of all layers, that anything which stays still names."""
        chunks: set[str] = set()
        layers: set[str] = set()
        gone = set(self._report.checkpoints)
        for info in self._objects.list("checkpoint"):
            name = CheckpointName.parse(info.name)
            if name is None or info.name != name.manifest or name.id in gone or info.size <= len(_CLOSED):
                continue
            try:
                manifest, opened = read_manifest(self._objects, self._keyring, name)
                sealed = manifest.index.fetch(self._objects, name.index, Kind.INDEX)
            except ObjectMissing as error:
                hint = f"relume checkpoints verify {name.id}; then rm it."
                raise StoreError(f"{name.id} is not whole: {error}", hint=hint) from error
            streams = index.decode(unseal(opened.data_key, Kind.INDEX, name.index, sealed), name.index)
            chunks |= _chunk_names(Tenant(opened.epoch, manifest.tenant), streams)
            layers |= set(manifest.layers)
        for info in self._objects.list("build"):
            if info.name in self._gone:
                continue
            build, _ = read_signed(self._objects, self._keyring, Kind.BUILD, info.name, BuildRecord)
            layers |= {ref.digest for ref in build.layers}
        for info in self._objects.list("layer"):
            sealed = self._objects.get(info.name, limit=stored_limit(Kind.LAYER))
            opened = unseal_signed(self._keyring, Kind.LAYER, info.name, sealed)
            chunks |= _chunk_names(Tenant(opened.epoch, LAYERS), index.decode(opened.body, info.name))
        return chunks, layers

    def _delete_old(self, infos: Iterable[ObjectInfo], old: float) -> None:
        for info in infos:
            if info.modified < old:
                self._delete(info, "gc.object")

    def _delete(self, info: ObjectInfo, point: str) -> None:
        self._report.objects += 1
        self._report.bytes += info.size
        if not self._report.dry_run:
            self._lease.check()
            self._objects.delete(info.name)
            faults.point(point)


def _chunk_names(tenant: Tenant, streams: Iterable[index.Stream]) -> set[str]:
    return {f"{tenant.prefix}/{ref.id.hex()}" for stream in streams for ref in stream.chunks}
