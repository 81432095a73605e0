"""The manifest: the one object that makes a checkpoint exist, and the record from which everything else is found.

It is read only after its signature was found good, and is still checked for size, unknown keys, and against
the name under which it was asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relume.errors import Untrusted
from relume.store.envelope import Kind, Opened, stored_limit, unseal_signed
from relume.store.keys import Keyring
from relume.store.names import CheckpointName
from relume.store.objects import Objects

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Text = Annotated[str, Field(max_length=256)]


class Record(BaseModel):
    """Base of every signed JSON body: unknown keys are refused, and so is every conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ObjectRef(Record):
    """A stored object: its size in bytes and the BLAKE3 of its stored bytes."""

    size: Count
    blake3: Digest

    @classmethod
    def of(cls, stored: bytes | bytearray | memoryview) -> ObjectRef:
        return cls(size=len(stored), blake3=blake3(stored).hexdigest())

    def fetch(self, objects: Objects, name: str, kind: Kind, *, fresh: bool = False) -> memoryview:
        """The stored bytes. Raises Untrusted for other bytes than this one names, or more than `kind` may have."""
        if self.size > stored_limit(kind):
            raise Untrusted(
                f"{name} is said to have {self.size} bytes; a {kind.name.lower()} is never that large"
            )
        data = objects.get(name, limit=stored_limit(kind), fresh=fresh)
        if len(data) != self.size or blake3(data).hexdigest() != self.blake3:
            raise Untrusted(f"{name} is not the object that its manifest names")
        return data


class Sizes(Record):
    """In bytes. `plain`: all streams; `data`: their non-zero pages; `stored`: all that a reader may fetch;
    `new_stored`: what this checkpoint added to the store (the rest was there, from other builds)."""

    plain: Count
    data: Count
    stored: Count
    new_stored: Count

    @property
    def shared_percent(self) -> float:
        """How much of the stored bytes other checkpoints had brought already."""
        return 100.0 * (1 - self.new_stored / self.stored) if self.stored else 0.0


class Manifest(Record):
    """One checkpoint. `facts` belong to the checkpoint room; the store keeps them and does not look inside."""

    format: Literal[1] = 1
    app: Text
    build: Text
    platform: Text
    generation: Annotated[int, Field(ge=1, lt=1 << 53)]
    created_at: float
    node: Text
    epoch: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    tenant: Text
    facts: dict[str, Any]
    index: ObjectRef
    images: ObjectRef
    layers: tuple[Text, ...] = Field(default=(), strict=False, max_length=1024)
    sizes: Sizes

    @property
    def name(self) -> CheckpointName:
        return CheckpointName(self.build, self.platform, self.generation)


R = TypeVar("R", bound=Record)


def read_signed(
    objects: Objects, keyring: Keyring, kind: Kind, name: str, model: type[R]
) -> tuple[R, Opened]:
    """Fetch, verify and parse a signed JSON object. Raises ObjectMissing, StoreError, Untrusted."""
    opened = unseal_signed(keyring, kind, name, objects.get(name, limit=stored_limit(kind)))
    return parse(opened.body, model, name), opened


def read_manifest(objects: Objects, keyring: Keyring, name: CheckpointName) -> tuple[Manifest, Opened]:
    """The manifest of exactly this checkpoint. Raises ObjectMissing, StoreError, Untrusted."""
    manifest, opened = read_signed(objects, keyring, Kind.MANIFEST, name.manifest, Manifest)
    check_manifest(manifest, opened, name)
    return manifest, opened


def check_manifest(manifest: Manifest, opened: Opened, name: CheckpointName) -> None:
    if (manifest.build, manifest.platform, manifest.generation) != (
        name.build,
        name.platform,
        name.generation,
    ):
        raise Untrusted(f"{name.manifest} is the manifest of {manifest.name.id}")
    if manifest.epoch != opened.epoch.id.hex():
        raise Untrusted(f"{name.manifest} was signed in one epoch and names chunks of another")


def parse(body: bytes, model: type[R], name: str) -> R:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Untrusted(f"{name}: {where or 'body'}: {first['msg']}") from None
