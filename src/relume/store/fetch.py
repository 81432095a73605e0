"""Fetching a checkpoint: from its name to a directory that a restore can begin with, and pages that follow.

Order: the manifest, the index and the small files, the held files, and then nothing more has to be there before
CRIU runs. The working set and the rest come through `RemotePages` while it does.
"""

from __future__ import annotations

import logging
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from relume.errors import StoreError, Untrusted
from relume.store import index
from relume.store.bundle import IMAGES, unpack_small, unpack_tree
from relume.store.cache import Cache, Pin
from relume.store.chunks import PAGE, Chunks, Tenant
from relume.store.envelope import Kind, stored_limit, unseal, unseal_signed
from relume.store.keys import Keyring
from relume.store.manifest import Manifest, check_manifest, parse
from relume.store.names import CheckpointName
from relume.store.objects import Objects
from relume.store.pages import RemotePages
from relume.store.publish import FILES_STREAM
from relume.store.working_set import WorkingSet, find_working_set, open_working_set

log = logging.getLogger(__name__)

HELD = "held"
_MANIFEST = "manifest.sealed"
_INDEX = "index.sealed"
_WORKING_SET = ".working-set.sealed"


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint on this node, perhaps with pages still missing. Close it when the instance needs no more pages.

    `directory` has `images/` (CRIU's, with sparse page images), `held/` if files came along, and the companions.
    `complete` means that every page is there and the store is not needed any more.
    """

    manifest: Manifest
    directory: Path
    pages: RemotePages
    complete: bool
    pin: Pin

    @property
    def images(self) -> Path:
        return self.directory / IMAGES

    @property
    def held(self) -> Path | None:
        held = self.directory / HELD
        return held if held.is_dir() else None

    def close(self) -> None:
        self.pages.close()
        self.pin.close()


def fetch(objects: Objects, keyring: Keyring, cache: Cache, name: CheckpointName) -> Fetched:
    """Bring `name` into the cache as far as a restore needs it, and open it.

    Raises ObjectMissing, StoreError, and Untrusted; then nothing of it is left in the cache.
    """
    pin = cache.pin(name.id) or _enter(objects, keyring, cache, name)
    try:
        return _open(objects, keyring, cache, name, pin)
    except Untrusted:
        pin.close()
        cache.evict(name.id)  # what lies on this disk was damaged; the next attempt begins anew
        raise
    except BaseException:
        pin.close()
        raise


def fill(fetched: Fetched, cache: Cache, parallel: int = 4) -> bool:
    """Fetch the rest, so that the next start needs no store; False if it was closed before the end."""
    if not fetched.complete and fetched.pages.fill(parallel):
        cache.mark_complete(fetched.directory)
        return True
    return fetched.complete


def _enter(objects: Objects, keyring: Keyring, cache: Cache, name: CheckpointName) -> Pin:
    sealed = objects.get(name.manifest, limit=stored_limit(Kind.MANIFEST))
    manifest, data_key, chunks = _open_manifest(objects, keyring, name, sealed)
    cache.make_room(manifest.sizes.data)

    def build(directory: Path) -> None:
        with ThreadPoolExecutor(2) as pool:
            index_job = pool.submit(manifest.index.fetch, objects, name.index, Kind.INDEX)
            small_job = pool.submit(manifest.images.fetch, objects, name.images, Kind.IMAGES)
            sealed_index, sealed_small = index_job.result(), small_job.result()
        _write(directory / _MANIFEST, sealed)
        _write(directory / _INDEX, sealed_index)
        unpack_small(unseal(data_key, Kind.IMAGES, name.images, sealed_small), directory, name.images)
        streams = _streams(manifest, data_key, name, sealed_index)
        held = tuple(stream for stream in streams if stream.name == FILES_STREAM)
        if held:
            _lay_held(directory, held, chunks, name)

    return cache.add(name.id, build)


def _lay_held(directory: Path, held: tuple[index.Stream, ...], chunks: Chunks, name: CheckpointName) -> None:
    tar = RemotePages(directory, held, chunks)
    try:
        tar.fill(parallel=8)
        (directory / HELD).mkdir(mode=0o700)
        with tar.path(FILES_STREAM).open("rb") as file:
            unpack_tree(file, directory / HELD, f"{name.id}/{FILES_STREAM}")
        tar.path(FILES_STREAM).unlink()
    finally:
        tar.close()


def _open(objects: Objects, keyring: Keyring, cache: Cache, name: CheckpointName, pin: Pin) -> Fetched:
    """From what lies in the cache, which is trusted no more than the store is."""
    try:
        sealed = (pin.directory / _MANIFEST).read_bytes()
        sealed_index = (pin.directory / _INDEX).read_bytes()
    except OSError as error:
        raise Untrusted(f"{pin.directory} in the cache is damaged: {error}") from None
    manifest, data_key, chunks = _open_manifest(objects, keyring, name, sealed)
    streams = tuple(s for s in _streams(manifest, data_key, name, sealed_index) if s.name != FILES_STREAM)
    complete = cache.is_complete(pin.directory)
    working_set = None if complete else _working_set(objects, keyring, name, streams, pin.directory)
    pages = RemotePages(pin.directory / IMAGES, streams, chunks, working_set)
    return Fetched(manifest, pin.directory, pages, complete, pin)


def _open_manifest(
    objects: Objects, keyring: Keyring, name: CheckpointName, sealed: bytes | memoryview
) -> tuple[Manifest, bytes, Chunks]:
    opened = unseal_signed(keyring, Kind.MANIFEST, name.manifest, sealed)
    manifest = parse(opened.body, Manifest, name.manifest)
    check_manifest(manifest, opened, name)
    return manifest, opened.data_key, Chunks(objects, Tenant(opened.epoch, manifest.tenant))


def _streams(
    manifest: Manifest, data_key: bytes, name: CheckpointName, sealed: bytes | memoryview
) -> tuple[index.Stream, ...]:
    if manifest.index != manifest.index.of(sealed):
        raise Untrusted(f"the index of {name.id} is not the one that its manifest names")
    streams = index.decode(unseal(data_key, Kind.INDEX, name.index, sealed), name.index)
    data = sum(ref.pages for stream in streams for ref in stream.chunks) * PAGE
    if data != manifest.sizes.data:
        raise Untrusted(
            f"the index of {name.id} has {data} bytes of pages, its manifest says {manifest.sizes.data}"
        )
    return streams


def _working_set(
    objects: Objects,
    keyring: Keyring,
    name: CheckpointName,
    streams: tuple[index.Stream, ...],
    directory: Path,
) -> WorkingSet | None:
    """The list that was fetched before, else the newest. Without a usable one a start takes longer, and is right."""
    try:
        if kept := sorted(directory.glob(f"*{_WORKING_SET}")):
            number, sealed = int(kept[0].name.removesuffix(_WORKING_SET)), kept[0].read_bytes()
        elif (found := find_working_set(objects, name)) is not None:
            number, sealed = found
        else:
            return None
        working_set = open_working_set(objects, keyring, name, number, sealed, streams)
        if not kept:
            beside = directory / f".{number}-{secrets.token_hex(4)}"
            _write(beside, sealed)
            beside.rename(directory / f"{number}{_WORKING_SET}")
        return working_set
    except (StoreError, OSError, ValueError) as error:
        log.warning("no working set for %s: %s", name.id, error)
        return None


def _write(path: Path, data: bytes | memoryview) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
