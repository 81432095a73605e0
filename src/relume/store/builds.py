"""Builds travel: a signed record under the digest of a build's inputs, which names the build's layers.

A node that is asked to deploy the same inputs adopts the region's build instead of making its own, so that the
files under a restored memory are the same bytes. A record's number is that of the lease it was published under
(the fencing token): a build made anew of the same inputs gets a higher one, and the highest counts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from relume.errors import Untrusted
from relume.store import faults
from relume.store.chunks import Tenant
from relume.store.envelope import Kind, new_data_key, seal_signed
from relume.store.keys import Keyring
from relume.store.manifest import Count, Digest, Record, Text, read_signed
from relume.store.names import word
from relume.store.objects import ObjectInfo, Objects


class LayerRef(Record):
    """A layer of a build: its digest (hex) and its size in bytes as a file."""

    digest: Digest
    size: Count


class BuildRecord(Record):
    """A build, by the digest of its inputs. `facts` (resolved versions) are the build room's; layers lowest first."""

    format: Literal[1] = 1
    app: Text
    inputs: Text
    number: Annotated[int, Field(ge=1, lt=1 << 53)]
    facts: dict[str, Any]
    layers: tuple[LayerRef, ...] = Field(strict=False, max_length=1024)


def publish_build(objects: Objects, keyring: Keyring, build: BuildRecord) -> bool:
    """Publish a build whose layers are in the store; False if its number is taken. Raises StoreError."""
    name = f"{build_prefix(Tenant(keyring.writer, build.app), build.inputs)}/{build.number}"
    sealed = seal_signed(keyring, Kind.BUILD, name, build.model_dump_json().encode(), new_data_key())
    faults.point("build.record")
    return objects.create(name, sealed)


def find_build(objects: Objects, keyring: Keyring, app: str, inputs: str) -> BuildRecord | None:
    """The region's newest build of these inputs, if there is one. Raises Untrusted, StoreError."""
    for epoch in reversed(keyring.epochs):
        prefix = build_prefix(Tenant(epoch, app), inputs)
        numbers = [number for info in objects.list(prefix) if (number := build_number(info.name)) is not None]
        if numbers:
            return read_build(objects, keyring, f"{prefix}/{max(numbers)}", app)
    return None


def read_build(objects: Objects, keyring: Keyring, name: str, app: str) -> BuildRecord:
    """The record in the object `name`. Raises ObjectMissing, Untrusted, StoreError."""
    build, _ = read_signed(objects, keyring, Kind.BUILD, name, BuildRecord)
    if build.app != app or not name.endswith(f"/{build.inputs}/{build.number}"):
        raise Untrusted(f"{name} is the record of another build")
    return build


def list_builds(objects: Objects, keyring: Keyring, app: str) -> list[ObjectInfo]:
    """The objects of all builds of an app, whatever is in them."""
    return [
        info
        for epoch in keyring.epochs
        for info in objects.list(f"build/{epoch.id.hex()}/{Tenant(epoch, app).id}")
        if build_number(info.name) is not None
    ]


def build_prefix(tenant: Tenant, inputs: str) -> str:
    return f"build/{tenant.epoch.id.hex()}/{tenant.id}/{word(inputs, 'inputs')}"


def build_number(name: str) -> int | None:
    """The number at the end of the name of a build's object; None for anything else."""
    parts = name.split("/")
    if len(parts) != 5 or not parts[4].isascii() or not parts[4].isdecimal() or len(parts[4]) > 15:
        return None
    return int(parts[4])
