"""`relume checkpoints export` and `import`: one checkpoint as one file (docs/format.md, "An exported checkpoint").

The file holds the store's objects as they are, sealed and signed: it may travel over any way, and importing it
needs the keys that reading it needs. Import verifies everything before the manifest makes it visible.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import BinaryIO

from relume.errors import Conflict, Untrusted
from relume.store import index
from relume.store.chunks import Chunks, Tenant
from relume.store.envelope import Kind, stored_limit, unseal, unseal_signed
from relume.store.keys import Keyring
from relume.store.lease import Leases
from relume.store.manifest import Manifest, ObjectRef, check_manifest, parse, read_manifest
from relume.store.names import CheckpointName
from relume.store.objects import Objects
from relume.store.publish import generations, wait_for_sweep

_HEAD = "relume-export"
_LARGEST = max(stored_limit(kind) for kind in Kind)


def export(objects: Objects, keyring: Keyring, name: CheckpointName, out: BinaryIO) -> None:
    """Write `name` to `out`. Raises ObjectMissing, Untrusted, StoreError, OSError."""
    manifest, opened = read_manifest(objects, keyring, name)
    sealed = manifest.index.fetch(objects, name.index, Kind.INDEX)
    streams = index.decode(unseal(opened.data_key, Kind.INDEX, name.index, sealed), name.index)
    chunks = Chunks(objects, Tenant(opened.epoch, manifest.tenant))
    names = [chunks.name(chunk_id) for chunk_id in dict.fromkeys(r.id for s in streams for r in s.chunks)]
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        head = {"format": 1, "build": name.build, "platform": name.platform, "generation": name.generation}
        head |= {"epoch": manifest.epoch, "tenant": manifest.tenant}
        _add(tar, _HEAD, json.dumps(head).encode())
        for each in (*names, name.index, name.images, name.manifest):
            _add(tar, each, bytes(objects.get(each, limit=_LARGEST)))


def import_(objects: Objects, keyring: Keyring, leases: Leases, file: BinaryIO) -> CheckpointName:
    """Bring an exported checkpoint into this store, under its own name. Nothing is visible unless all of it is right.

    Its generation stays what it was, because that is signed; the lease taken meanwhile is a higher one, so what
    this region makes later is newer. Raises Untrusted for a file that is damaged, foreign, or signed by others,
    Conflict when this or a newer generation is there already, StoreError.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            return _import(objects, keyring, leases, tar)
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise Untrusted(f"this is not an exported checkpoint, or it was cut short: {error}") from None


def export_file(objects: Objects, keyring: Keyring, name: CheckpointName, path: Path) -> None:
    """Like `export`, to a new file (0600) that appears when it is whole."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as out:
            beside.chmod(0o600)
            export(objects, keyring, name, out)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)


def _import(objects: Objects, keyring: Keyring, leases: Leases, tar: tarfile.TarFile) -> CheckpointName:
    head = json.loads(_next(tar, _HEAD))
    if head["format"] != 1:
        raise Untrusted(f"this export has format {head['format']}; this relume reads format 1")
    name = CheckpointName(head["build"], head["platform"], head["generation"])
    newest = max(generations(objects, name.build, name.platform), default=0)
    if newest >= name.generation:
        raise Conflict(
            f"{objects.url} has generation {newest} of {name.build} already; {name.generation} is not newer"
        )
    tenant_name = str(head["tenant"])
    with leases.acquire(name.lease, above=name.generation, tenant=tenant_name).kept() as lease:
        wait_for_sweep(leases, lease)
        came: dict[str, bytes] = {}  # the few objects that are not chunks
        chunks = Chunks(
            objects, Tenant(keyring.epoch(bytes.fromhex(head["epoch"]), "this export"), tenant_name)
        )
        stored: set[str] = set()
        for info in iter(tar.next, None):
            sealed = _content(tar, info)
            if not info.name.startswith(f"{chunks.tenant.prefix}/"):
                came[info.name] = sealed
                continue
            chunk_id = bytes.fromhex(info.name.rsplit("/", 1)[1])
            if chunks.name(chunk_id) != info.name:
                raise Untrusted(f"this export holds an object named {info.name!r}")
            chunks.open(chunk_id, sealed)
            chunks.store(chunk_id, sealed)
            stored.add(info.name)
        _complete(keyring, name, came, chunks, stored)
        lease.check()
        for each in (name.index, name.images, name.manifest):
            if not objects.create(each, came[each]):
                raise Conflict(f"{each} is in {objects.url} already")
    return name


def _complete(
    keyring: Keyring, name: CheckpointName, came: dict[str, bytes], chunks: Chunks, stored: set[str]
) -> None:
    """Raise Untrusted unless what came is exactly what the manifest names."""
    opened = unseal_signed(keyring, Kind.MANIFEST, name.manifest, came[name.manifest])
    manifest = parse(opened.body, Manifest, name.manifest)
    check_manifest(manifest, opened, name)
    for each, ref in ((name.index, manifest.index), (name.images, manifest.images)):
        if ObjectRef.of(came[each]) != ref:
            raise Untrusted(f"{each} is not the object that its manifest names")
    streams = index.decode(unseal(opened.data_key, Kind.INDEX, name.index, came[name.index]), name.index)
    named = {chunks.name(ref.id) for stream in streams for ref in stream.chunks}
    if named != stored or (manifest.epoch, manifest.tenant) != (
        chunks.tenant.epoch.id.hex(),
        chunks.tenant.name,
    ):
        raise Untrusted(f"this export does not hold the chunks that {name.id} names")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o600
    tar.addfile(info, io.BytesIO(data))


def _next(tar: tarfile.TarFile, name: str) -> bytes:
    info = tar.next()
    if info is None or info.name != name:
        raise Untrusted("this is not an exported checkpoint")
    return _content(tar, info)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if not info.isreg() or info.size > _LARGEST:
        raise Untrusted(f"this export holds {info.name!r}, which is no object of a store")
    content = tar.extractfile(info)
    assert content is not None
    data = content.read()
    if len(data) != info.size:
        raise Untrusted("this export was cut short")
    return data
