"""Builds travel too: a layer is a stream of chunks under its digest, a build a signed record that names layers.

A node that is asked to deploy the same inputs adopts the region's build instead of making its own, so that the
files under a restored memory are the same bytes. What a digest means (of a tar, of a tree) is the build room's
affair: it hands a file over under a name, and checks what comes back against that name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from relume.errors import Conflict, Untrusted
from relume.store import faults, index
from relume.store.chunks import Chunks, Tenant
from relume.store.envelope import Kind, new_data_key, seal_signed, stored_limit, unseal_signed
from relume.store.keys import Epoch, Keyring
from relume.store.manifest import Count, Digest, Record, Text, read_signed
from relume.store.names import word
from relume.store.objects import Objects
from relume.store.pages import RemotePages
from relume.store.upload import Limits, Progress, upload_streams

LAYERS = "layers"  # the tenant of all layers: two apps on one base share its chunks
_STREAM = "layer"


class LayerRef(Record):
    """A layer of a build: its digest (hex) and its size in bytes as a file."""

    digest: Digest
    size: Count


class BuildRecord(Record):
    """A build, by the digest of its inputs. `facts` (resolved versions) are the build room's; layers lowest first."""

    format: Literal[1] = 1
    app: Text
    inputs: Text
    facts: dict[str, Any]
    layers: tuple[LayerRef, ...] = Field(strict=False, max_length=1024)


def publish_layer(
    objects: Objects, keyring: Keyring, digest: str, file: Path, *, limits: Limits, progress: Progress
) -> None:
    """Bring the layer `file` into the store under `digest`; nothing to do if it is there. Raises StoreError, OSError.

    The caller holds a lease with `tenant=LAYERS`, or garbage collection may take the chunks away meanwhile.
    """
    tenant = Tenant(keyring.writer, LAYERS)
    name = layer_name(tenant, digest)
    if objects.exists(name):
        return
    progress.total += file.stat().st_size
    uploaded = upload_streams(Chunks(objects, tenant), [(_STREAM, file)], limits=limits, progress=progress)
    faults.point("layer.chunk")
    objects.create(
        name, seal_signed(keyring, Kind.LAYER, name, index.encode(uploaded.streams), new_data_key())
    )
    faults.point("layer.index")


def fetch_layer(objects: Objects, keyring: Keyring, digest: str, file: Path, *, parallel: int = 8) -> None:
    """Write the layer `digest` to the new file `file`.

    Raises ObjectMissing if no epoch of ours has it, Untrusted, StoreError. The bytes are those that a node of
    this region published; that they have the digest is the caller's to check.
    """
    epoch = _epoch_of(objects, keyring, lambda tenant: layer_name(tenant, digest))
    tenant = Tenant(epoch, LAYERS)
    name = layer_name(tenant, digest)
    opened = unseal_signed(keyring, Kind.LAYER, name, objects.get(name, limit=stored_limit(Kind.LAYER)))
    streams = index.decode(opened.body, name)
    if [stream.name for stream in streams] != [_STREAM]:
        raise Untrusted(f"{name} is not one layer")
    pages = RemotePages(file.parent, (index.Stream(file.name, *_rest(streams[0])),), Chunks(objects, tenant))
    try:
        pages.fill(parallel)
    finally:
        pages.close()


def publish_build(objects: Objects, keyring: Keyring, build: BuildRecord) -> BuildRecord:
    """Publish a build whose layers are in the store; returns the region's, which is another's if that was first."""
    name = build_name(Tenant(keyring.writer, build.app), build.inputs)
    sealed = seal_signed(keyring, Kind.BUILD, name, build.model_dump_json().encode(), new_data_key())
    if objects.create(name, sealed):
        return build
    found = find_build(objects, keyring, build.app, build.inputs)
    if found is None:
        raise Conflict(f"the build {build.inputs} of {build.app} was published and removed again meanwhile")
    return found


def find_build(objects: Objects, keyring: Keyring, app: str, inputs: str) -> BuildRecord | None:
    """The region's build of these inputs, if there is one. Raises Untrusted, StoreError."""
    for epoch in reversed(keyring.epochs):
        name = build_name(Tenant(epoch, app), inputs)
        if objects.exists(name):
            build, _ = read_signed(objects, keyring, Kind.BUILD, name, BuildRecord)
            if (build.app, build.inputs) != (app, inputs):
                raise Untrusted(f"{name} is the build of other inputs")
            return build
    return None


def remove_build(objects: Objects, keyring: Keyring, app: str, inputs: str) -> None:
    """Delete the records of a build; its layers are garbage collection's."""
    for epoch in keyring.epochs:
        objects.delete(build_name(Tenant(epoch, app), inputs))


def layer_name(tenant: Tenant, digest: str) -> str:
    return f"layer/{tenant.epoch.id.hex()}/{tenant.id}/{word(digest, 'layer')}"


def build_name(tenant: Tenant, inputs: str) -> str:
    return f"build/{tenant.epoch.id.hex()}/{tenant.id}/{word(inputs, 'inputs')}"


def _rest(stream: index.Stream) -> tuple[int, tuple[tuple[int, int], ...], tuple[index.ChunkRef, ...]]:
    return stream.size, stream.runs, stream.chunks


def _epoch_of(objects: Objects, keyring: Keyring, name: Any) -> Epoch:
    for epoch in reversed(keyring.epochs):
        if objects.exists(name(Tenant(epoch, LAYERS))):
            return epoch
    return keyring.writer
