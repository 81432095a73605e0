"""Keys: who may write checkpoints that this node runs, and who can read them.

A *key file* holds one or more epochs; an epoch is an Ed25519 signing key and a 32-byte secret, from which
every encryption key is derived (docs/format.md). A node always has a key file of its own; with a region's
key file it writes with that one and reads with both. Nodes that hold the same region key file trust each
other wholly: there is no smaller trust between nodes (docs/security.md).

Rotation adds an epoch: new objects are written under it, old ones stay readable until the old epoch is
taken out of the file.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from relume.errors import ConfigError, Untrusted

ENVIRONMENT = "RELUME_REGION_KEY"
KEY_BYTES = 32
_NONCE_BYTES = 12


class KeyWrapper(Protocol):
    """The seam for a key management service: it keeps the wrapping key, we keep what it gives back.

    `name` is the object that the data key is for; what was wrapped for one name must not unwrap for another.
    `unwrap` raises Untrusted for what it did not wrap.
    """

    def wrap(self, name: str, key: bytes) -> bytes: ...

    def unwrap(self, name: str, wrapped: bytes) -> bytes: ...


@dataclass(frozen=True)
class Epoch:
    """One generation of a key file: it signs, and its secret gives all encryption keys."""

    signing: bytes
    secret: bytes

    @cached_property
    def private_key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.signing)

    @cached_property
    def public_key(self) -> Ed25519PublicKey:
        return self.private_key.public_key()

    @cached_property
    def id(self) -> bytes:
        """16 bytes that name the epoch in objects and, as hex, in the names of chunks."""
        return blake3(self.public_key.public_bytes_raw()).digest(16)

    def derive(self, info: str) -> bytes:
        """The 32-byte key for one purpose. The secret is uniform, so HKDF needs no salt (RFC 5869, 3.1)."""
        return HKDF(SHA256(), KEY_BYTES, None, b"relume 1 " + info.encode()).derive(self.secret)

    def __repr__(self) -> str:
        return f"Epoch({self.id.hex()})"  # never the keys: this lands in logs and tracebacks


class SecretWrapper:
    """Wraps data keys under the epoch's own secret: what is used where there is no key management service."""

    def __init__(self, epoch: Epoch) -> None:
        self._aead = AESGCM(epoch.derive("wrap"))

    def wrap(self, name: str, key: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, key, name.encode())

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        try:
            return self._aead.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise Untrusted(f"the data key of {name} was not wrapped by this region's key") from None


class Keyring:
    """The epochs a node accepts, and the one it writes with (the last of its region's, else of its own)."""

    def __init__(
        self, own: tuple[Epoch, ...], region: tuple[Epoch, ...] = (), *, kms: KeyWrapper | None = None
    ) -> None:
        self._by_id = {epoch.id: epoch for epoch in (*own, *region)}
        self.writer = (region or own)[-1]
        self.shared = bool(region)
        self._kms = kms

    def epoch(self, signer: bytes, name: str) -> Epoch:
        """Raises Untrusted for a signer that is neither this node nor its region."""
        try:
            return self._by_id[signer]
        except KeyError:
            raise Untrusted(
                f"{name} is signed by key {signer.hex()}, which is neither this node's nor its region's",
                hint="Nodes trust each other when [region] key_file names the same key file.",
            ) from None

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        return tuple(self._by_id.values())

    def wrapper(self, epoch: Epoch) -> KeyWrapper:
        return self._kms or SecretWrapper(epoch)


def new_key_file(path: Path) -> Epoch:
    """`relume keys new FILE`: make a key file, 0600. Raises ConfigError if the file exists or cannot be made."""
    epoch = _new_epoch()
    _write(path, (epoch,), os.O_EXCL)
    return epoch


def rotate_key_file(path: Path) -> Epoch:
    """Add an epoch and make it the one that writes. Every node needs the new file before it can read."""
    epochs = (*load_key_file(path), _new_epoch())
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    _write(beside, epochs, os.O_EXCL)
    beside.replace(path)
    return epochs[-1]


def load_key_file(path: Path) -> tuple[Epoch, ...]:
    """Raises ConfigError for a file that is missing, damaged, or readable by others."""
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"key file {path}: {error}", hint=f"relume keys new {path}") from error
    if mode & 0o077:
        raise ConfigError(
            f"key file {path} has mode {mode:o}; others could read it", hint=f"chmod 600 {path}"
        )
    return parse_keys(text, str(path))


def load_own_key(path: Path) -> tuple[Epoch, ...]:
    """The node's own key file, made on first use."""
    if not path.exists():
        try:
            new_key_file(path)
        except ConfigError:
            if not path.exists():  # else another process of this node was faster
                raise
    return load_key_file(path)


def load_region_key(path: Path | None) -> tuple[Epoch, ...]:
    """The region's epochs from $RELUME_REGION_KEY (the file's content) or from `path`; none when neither is set."""
    if text := os.environ.get(ENVIRONMENT):
        return parse_keys(text, f"${ENVIRONMENT}")
    return load_key_file(path) if path is not None else ()


def parse_keys(text: str, where: str) -> tuple[Epoch, ...]:
    """The epochs in a key file's text. Raises ConfigError that names `where` and never quotes the text."""
    try:
        data: Any = json.loads(text)
        if data["relume_key"] != 1:
            raise ConfigError(
                f"{where} is a key file of version {data['relume_key']}; this relume knows version 1"
            )
        epochs = tuple(Epoch(bytes.fromhex(e["signing"]), bytes.fromhex(e["secret"])) for e in data["epochs"])
        if not epochs or any(len(e.signing) != KEY_BYTES or len(e.secret) != KEY_BYTES for e in epochs):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{where} is not a relume key file", hint="relume keys new FILE makes one."
        ) from None
    return epochs


def _new_epoch() -> Epoch:
    return Epoch(Ed25519PrivateKey.generate().private_bytes_raw(), secrets.token_bytes(KEY_BYTES))


def _write(path: Path, epochs: tuple[Epoch, ...], flags: int) -> None:
    text = json.dumps(
        {"relume_key": 1, "epochs": [{"signing": e.signing.hex(), "secret": e.secret.hex()} for e in epochs]},
        indent=1,
    )
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"key file {path}: {error.strerror}", hint="An existing key file is never overwritten."
        ) from error
