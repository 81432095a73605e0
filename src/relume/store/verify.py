"""`relume checkpoints verify`: is every byte of a checkpoint in the store, and is it right?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from relume.errors import ObjectMissing, Untrusted
from relume.store import index
from relume.store.chunks import Chunks, Tenant
from relume.store.envelope import Kind, unseal
from relume.store.keys import Keyring
from relume.store.manifest import read_manifest
from relume.store.names import CheckpointName
from relume.store.objects import Objects
from relume.store.working_set import find_working_set, open_working_set


@dataclass(frozen=True, slots=True)
class Verdict:
    """`problems` are sentences; none means that every object is there, genuine and whole. `bytes` were read."""

    name: CheckpointName
    objects: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.problems


def verify(objects: Objects, keyring: Keyring, name: CheckpointName, *, parallel: int = 8) -> Verdict:
    """Read all of `name` and check it. A bad object is a problem in the verdict; a store that fails is a StoreError."""
    problems: list[str] = []
    before = objects.counters.bytes_read
    count = 0
    try:
        manifest, opened = read_manifest(objects, keyring, name)
        sealed = manifest.index.fetch(objects, name.index, Kind.INDEX)
        streams = index.decode(unseal(opened.data_key, Kind.INDEX, name.index, sealed), name.index)
        small = manifest.images.fetch(objects, name.images, Kind.IMAGES)
        unseal(opened.data_key, Kind.IMAGES, name.images, small)
        count = 3
    except (Untrusted, ObjectMissing) as error:
        return Verdict(name, count, objects.counters.bytes_read - before, (str(error),))
    chunks = Chunks(objects, Tenant(opened.epoch, manifest.tenant))
    refs = {ref.id: ref for stream in streams for ref in stream.chunks}

    def check(ref: index.ChunkRef) -> str:
        try:
            chunks.get(ref.id, ref.pages)
        except (Untrusted, ObjectMissing) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(parallel, thread_name_prefix="verify") as pool:
        problems += filter(None, pool.map(check, refs.values()))
    count += len(refs)
    try:
        if (found := find_working_set(objects, name)) is not None:
            working_set = open_working_set(objects, keyring, name, *found, streams)
            for part in range(len(working_set.parts)):
                working_set.fetch(part)
            count += 1 + len(working_set.parts)
    except (Untrusted, ObjectMissing) as error:
        problems.append(str(error))
    return Verdict(name, count, objects.counters.bytes_read - before, tuple(problems))
