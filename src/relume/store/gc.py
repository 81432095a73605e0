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

A removed checkpoint stays whole for the grace period, for those that still page from it; then its manifest goes
first and the rest after it. All ages are differences between time stamps of the store itself: no node's clock
is involved.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from relume.errors import ObjectMissing, StoreError
from relume.store import faults, index
from relume.store.chunks import Tenant
from relume.store.envelope import Kind, stored_limit, unseal, unseal_signed
from relume.store.keys import Keyring
from relume.store.layers import LAYERS
from relume.store.lease import Lease, Leases, Standing
from relume.store.manifest import read_manifest
from relume.store.names import CheckpointName
from relume.store.objects import ObjectInfo, Objects
from relume.store.publish import SWEEP

GRACE_SECONDS = 24 * 3600.0
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

    def run(self) -> Report:
        old = self._store_time() - self._grace_s
        busy = self._busy_tenants()
        if "" in busy:  # somebody who does not say which tenant
            self._report.busy = ["*"]
            return self._report
        self._report.busy = sorted(busy)
        self._sweep_checkpoints(old)
        used = self._mark()
        for info in self._objects.list("chunk"):
            tenant = info.name.split("/")[2]
            if tenant not in busy and info.modified < old and info.name not in used:
                self._delete(info, "gc.chunk")
                self._report.chunks += 1
        return self._report

    def _store_time(self) -> float:
        """Now, by the store's clock: the time stamp of an object made now."""
        name = f"probe/{secrets.token_hex(16)}"
        self._objects.create(name, name.encode())
        try:
            return next(info.modified for info in self._objects.list("probe") if info.name == name)
        finally:
            self._objects.delete(name)

    def _busy_tenants(self) -> set[str]:
        """The ids of tenants with an upload that may be alive; generations of dead ones are closed."""
        series: dict[str, list[str]] = defaultdict(list)
        for info in self._objects.list("lease"):
            parts = info.name.split("/")
            prefix, rest = "/".join(parts[:3]), "/".join(parts[3:])
            series[prefix].append(rest)
        busy: set[str] = set()
        for prefix, names in series.items():
            standing = Standing.of(names)
            if standing.done:
                continue
            if self._leases.is_alive(prefix):
                tenant = self._leases.facts(prefix, standing.number).get("tenant", "")
                busy |= {Tenant(epoch, tenant).id for epoch in self._keyring.epochs} if tenant else {""}
            elif not self._report.dry_run:
                self._close(prefix, standing.number)
        return busy

    def _close(self, prefix: str, number: int) -> None:
        """Make sure that the dead owner of this lease can never publish under it, then call the lease done."""
        _, build, platform = prefix.split("/")
        name = CheckpointName(build, platform, number)
        if self._objects.create(name.manifest, _CLOSED):
            self._objects.create(name.removed, b"removed\n")
        self._leases.write(f"{prefix}/{number}/done", {})

    def _sweep_checkpoints(self, old: float) -> None:
        """Delete removed checkpoints, and what uploads that never finished left behind, once they are old."""
        groups: dict[CheckpointName, list[ObjectInfo]] = defaultdict(list)
        for info in self._objects.list("checkpoint"):
            if (name := CheckpointName.parse(info.name)) is not None:
                groups[name].append(info)
        for name, infos in groups.items():
            names = {info.name: info for info in infos}
            removed = names.get(name.removed)
            if name.manifest in names and removed is None:
                continue
            if max(info.modified for info in infos) >= old or self._leases.is_alive(name.lease):
                continue
            doomed = [names[name.manifest]] if name.manifest in names else []
            doomed += [info for info in infos if info.name not in (name.manifest, name.removed)]
            doomed += self._objects.list(name.working_sets)
            for info in doomed:
                self._delete(info, "gc.manifest" if info.name == name.manifest else "gc.object")
            if removed is not None:
                self._delete(removed, "gc.object")
            self._report.checkpoints.append(name.id)

    def _mark(self) -> set[str]:
        """The names of all chunks that any manifest or layer still names."""
        used: set[str] = set()
        gone = set(self._report.checkpoints)
        for info in self._objects.list("checkpoint"):
            name = CheckpointName.parse(info.name)
            if (
                name is not None
                and info.name == name.manifest
                and name.id not in gone
                and info.size > len(_CLOSED)
            ):
                used.update(self._chunks_of_checkpoint(name))
        for info in self._objects.list("layer"):
            used.update(self._chunks_of_layer(info.name))
        return used

    def _chunks_of_checkpoint(self, name: CheckpointName) -> Iterator[str]:
        try:
            manifest, opened = read_manifest(self._objects, self._keyring, name)
            sealed = manifest.index.fetch(self._objects, name.index, Kind.INDEX)
        except ObjectMissing as error:
            raise StoreError(
                f"{name.id} is not whole: {error}", hint="relume checkpoints verify; then rm it."
            ) from error
        prefix = Tenant(opened.epoch, manifest.tenant).prefix
        for stream in index.decode(unseal(opened.data_key, Kind.INDEX, name.index, sealed), name.index):
            for ref in stream.chunks:
                yield f"{prefix}/{ref.id.hex()}"

    def _chunks_of_layer(self, name: str) -> Iterator[str]:
        opened = unseal_signed(
            self._keyring, Kind.LAYER, name, self._objects.get(name, limit=stored_limit(Kind.LAYER))
        )
        prefix = Tenant(opened.epoch, LAYERS).prefix
        for stream in index.decode(opened.body, name):
            for ref in stream.chunks:
                yield f"{prefix}/{ref.id.hex()}"

    def _delete(self, info: ObjectInfo, point: str) -> None:
        self._report.objects += 1
        self._report.bytes += info.size
        if not self._report.dry_run:
            self._lease.check()
            self._objects.delete(info.name)
            faults.point(point)
