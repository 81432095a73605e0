"""Publishing a checkpoint: the whole way from CRIU's image directory to a manifest that other nodes see.

The order is what makes it safe to die anywhere: chunks, then the index and the images that need them, then the
manifest. Without the manifest nothing exists; with it everything does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from relume.errors import StoreError, Superseded
from relume.store import faults, index
from relume.store.bundle import is_pages, pack_small, pack_tree
from relume.store.chunks import Chunks, Tenant
from relume.store.envelope import Kind, new_data_key, seal, seal_signed
from relume.store.keys import Keyring
from relume.store.lease import Lease, Leases
from relume.store.manifest import Manifest, ObjectRef, Sizes
from relume.store.names import CheckpointName
from relume.store.objects import Data, Objects
from relume.store.upload import Limits, Progress, upload_streams

FILES_STREAM = "files.tar"
SWEEP = "sweep"


@dataclass(frozen=True, slots=True)
class LocalCheckpoint:
    """A checkpoint on this node's disk, as the engine left it.

    `images` is CRIU's image directory; `files` the tree of held files, if any; `companions` small files that
    travel along (by their base names); `facts` the checkpoint room's record (JSON, shown by `inspect`); `layers`
    the digests of the build's layers, lowest first. None of it may change meanwhile.
    """

    app: str
    build: str
    platform: str
    images: Path
    files: Path | None = None
    companions: Sequence[Path] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    layers: Sequence[str] = ()


def publish(
    objects: Objects,
    keyring: Keyring,
    leases: Leases,
    lease: Lease,
    source: LocalCheckpoint,
    *,
    node: str,
    limits: Limits,
    progress: Progress,
    scratch: Path | None = None,
    mend: bool = False,
) -> Manifest:
    """Upload `source` as the generation that `lease` fences, and publish it.

    `lease` is kept by the caller (`with lease.kept()`). `scratch` is a folder on disk for the tar of held files.
    `mend`: it takes the place of a damaged one, see `upload_streams`. Raises Superseded when the lease was lost or a
    newer generation exists, StoreError when the store does not answer; either way nothing became visible, and the next
    attempt sends only what is missing.
    """
    name = CheckpointName(source.build, source.platform, lease.number)
    tenant = Tenant(keyring.writer, source.app)
    wait_for_sweep(leases, lease)
    faults.point("publish.begin")
    with TemporaryDirectory(dir=scratch, prefix="publish-") as temporary:
        sources = [(path.name, path) for path in sorted(source.images.iterdir()) if is_pages(path.name)]
        if source.files is not None:
            tar = Path(temporary) / FILES_STREAM
            with tar.open("wb") as out:
                pack_tree(source.files, out)
            sources.insert(0, (FILES_STREAM, tar))
        plain = progress.total = sum(path.stat().st_size for _, path in sources)
        uploaded = upload_streams(
            Chunks(objects, tenant), sources, limits=limits, progress=progress, check=lease.check, mend=mend
        )
    data_key = new_data_key()
    sealed_index = seal(data_key, Kind.INDEX, name.index, index.encode(uploaded.streams))
    _create(objects, name.index, sealed_index)
    faults.point("publish.index")
    sealed_images = seal(data_key, Kind.IMAGES, name.images, pack_small(source.images, source.companions))
    _create(objects, name.images, sealed_images)
    faults.point("publish.images")
    small = len(sealed_index) + len(sealed_images)
    manifest = Manifest(
        app=source.app,
        build=source.build,
        platform=source.platform,
        generation=lease.number,
        created_at=time.time(),
        node=node,
        epoch=keyring.writer.id.hex(),
        tenant=source.app,
        facts=source.facts,
        index=ObjectRef.of(sealed_index),
        images=ObjectRef.of(sealed_images),
        layers=tuple(source.layers),
        sizes=Sizes(
            plain=plain,
            data=uploaded.data,
            stored=uploaded.stored + small,
            new_stored=uploaded.new_stored + small,
        ),
    )
    body = seal_signed(keyring, Kind.MANIFEST, name.manifest, manifest.model_dump_json().encode(), data_key)
    lease.check()
    if newer := [
        other for other in generations(objects, source.build, source.platform) if other > lease.number
    ]:
        raise Superseded(
            f"generation {newer[-1]} of {source.build} was published while {lease.number} was on its way"
        )
    if not objects.create(name.manifest, body):
        raise Superseded(f"{name.manifest} exists: this generation was published or closed by another")
    faults.point("publish.manifest")
    progress.finished = True
    return manifest


def generations(objects: Objects, build: str, platform: str) -> list[int]:
    """The generations that have a manifest and were not removed, oldest first. One request."""
    visible: set[int] = set()
    removed: set[int] = set()
    for info in objects.list(f"checkpoint/{build}/{platform}"):
        if (name := CheckpointName.parse(info.name)) is not None:
            if info.name == name.manifest:
                visible.add(name.generation)
            elif info.name == name.removed:
                removed.add(name.generation)
    return sorted(visible - removed)


def wait_for_sweep(leases: Leases, lease: Lease) -> None:
    """A sweep that began before our lease may be about to delete chunks that we would find present.

    The sweeper takes its lease and then looks for ours; we took ours and now look for its: one sees the other
    (see gc).
    """
    while leases.is_alive(SWEEP):
        lease.check()
        time.sleep(min(1.0, leases.seconds / 10))


def _create(objects: Objects, name: str, data: Data) -> None:
    """These names carry our fencing token: only an earlier attempt under the same lease can have made them."""
    if not objects.create(name, data):
        raise StoreError(f"{name} exists already, with other bytes", hint="Publish again under a new lease.")
