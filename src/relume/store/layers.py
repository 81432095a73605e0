"""Layers travel: each is a stream of chunks under its digest, signed, in one name space for all apps.

What a digest means (of a tar, of a tree) is the build room's affair: it hands a file over under a name, and checks
what comes back against that name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from relume.errors import ObjectMissing, Untrusted
from relume.store import faults, index
from relume.store.chunks import Chunks, Tenant
from relume.store.envelope import Kind, new_data_key, seal_signed, stored_limit, unseal_signed
from relume.store.keys import Epoch, Keyring
from relume.store.names import word
from relume.store.objects import Objects
from relume.store.pages import RemotePages
from relume.store.upload import Limits, Progress, upload_streams

LAYERS = "layers"  # the tenant of all layers: two apps on one base share its chunks
_STREAM = "layer"


def publish_layer(
    objects: Objects,
    keyring: Keyring,
    digest: str,
    pack: Callable[[Path], None],
    scratch: Path,
    *,
    limits: Limits,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
    mend: bool = False,
) -> int:
    """Bring a layer into the store under `digest`, unless it is there; returns its size in bytes as a file.

    With `mend` also where it is there, in its place: it may be damaged. `pack` writes it to the file it is given, in
    the folder `scratch`; it is not called for a layer that is there. The caller holds a lease with `tenant=LAYERS`, or
    garbage collection may take the chunks away meanwhile; `check` raises when that was lost. Raises StoreError,
    OSError, and Untrusted for one that is there and cannot be read.
    """
    tenant = Tenant(keyring.writer, LAYERS)
    name = layer_name(tenant, digest)
    if not mend and objects.exists(name):
        return _open(objects, keyring, name).size
    file = scratch / digest
    try:
        pack(file)
        size = file.stat().st_size
        progress.total += size
        uploaded = upload_streams(
            Chunks(objects, tenant),
            [(_STREAM, file)],
            limits=limits,
            progress=progress,
            check=check,
            mend=mend,
        )
    finally:
        file.unlink(missing_ok=True)
    faults.point("layer.chunk")
    sealed = seal_signed(keyring, Kind.LAYER, name, index.encode(uploaded.streams), new_data_key())
    (objects.put if mend else objects.create)(name, sealed)
    faults.point("layer.index")
    return size


def fetch_layer(objects: Objects, keyring: Keyring, digest: str, file: Path, *, parallel: int = 8) -> None:
    """Write the layer `digest` to the new file `file`.

    Raises ObjectMissing if no epoch of ours has it, Untrusted, StoreError. The bytes are those that a node of
    this region published; that they have the digest is the caller's to check.
    """
    epoch = _epoch_of(objects, keyring, digest)
    tenant = Tenant(epoch, LAYERS)
    stream = _open(objects, keyring, layer_name(tenant, digest))
    found = index.Stream(file.name, stream.size, stream.runs, stream.chunks)
    pages = RemotePages(file.parent, (found,), Chunks(objects, tenant))
    try:
        pages.fill(parallel)
    finally:
        pages.close()


def layer_name(tenant: Tenant, digest: str) -> str:
    return f"layer/{tenant.epoch.id.hex()}/{tenant.id}/{word(digest, 'layer')}"


def _open(objects: Objects, keyring: Keyring, name: str) -> index.Stream:
    opened = unseal_signed(keyring, Kind.LAYER, name, objects.get(name, limit=stored_limit(Kind.LAYER)))
    streams = index.decode(opened.body, name)
    if [stream.name for stream in streams] != [_STREAM]:
        raise Untrusted(f"{name} is not one layer")
    return streams[0]


def _epoch_of(objects: Objects, keyring: Keyring, digest: str) -> Epoch:
    for epoch in reversed(keyring.epochs):
        if objects.exists(layer_name(Tenant(epoch, LAYERS), digest)):
            return epoch
    raise ObjectMissing(f"layer {digest} is not in {objects.url}")
