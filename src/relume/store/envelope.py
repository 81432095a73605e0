"""How objects are sealed: compressed, encrypted, bound to their name, and where it matters signed.

`seal`/`unseal` are for objects under a key that the reader already has (chunks, and what a manifest names);
`seal_signed`/`unseal_signed` for those a reader starts from (manifests, working-set lists, builds, layers).
Opening guarantees: nobody without the keys made or changed a byte, the object is of the kind and under the
name that was asked for, and unpacking it takes no more memory than its kind may. It does not guarantee
that it is the newest one (see `region`). docs/format.md has the bytes.
"""

from __future__ import annotations

import enum
import secrets
import struct
import sys
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from relume.errors import Untrusted
from relume.store.keys import KEY_BYTES, Epoch, Keyring

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT = 1
_MAGIC = b"relume"
_HEAD = struct.Struct("<6sBB")
_SIGNED_HEAD = struct.Struct("<6sBB16sH")
_NONCE = 12
_TAG = 16
_SIGNATURE = 64
_LEVEL = 1  # measured (bench/store.py): level 3 is half as fast and saves a tenth more
_SAMPLE = 16 << 10
_SAMPLES = 3
_WORTH_IT = 0.9
"""What shrinks by less than a tenth is stored as it is. Weights in float32 shrink by 8 %, and packing and unpacking
them is more than half of what an upload and a start cost in processor time."""
_RAW_FRAME = (
    b"\x28\xb5\x2f\xfd\xa0"  # single segment, content size in 4 bytes, no checksum (RFC 8878, 3.1.1.1)
)
_BLOCK = 128 << 10  # the largest of a zstd frame (RFC 8878, 3.1.1.2.4)
_MIB = 1 << 20


class Kind(enum.IntEnum):
    CHUNK = 1
    INDEX = 2
    IMAGES = 3
    MANIFEST = 4
    WORKING_SET_PART = 5
    WORKING_SET_LIST = 6
    LAYER = 7
    BUILD = 8


# The largest plain body of a kind, in bytes.
LIMITS = {
    Kind.CHUNK: 4 * _MIB,
    Kind.INDEX: 256 * _MIB,
    Kind.IMAGES: 256 * _MIB,
    Kind.MANIFEST: 64 * _MIB,
    Kind.WORKING_SET_PART: 16 * _MIB,
    Kind.WORKING_SET_LIST: 64 * _MIB,
    Kind.LAYER: 64 * _MIB,
    Kind.BUILD: 64 * _MIB,
}


def stored_limit(kind: Kind) -> int:
    """The largest stored object of a kind: zstd adds 1/256 at worst, the envelope under 1 KiB."""
    return LIMITS[kind] + LIMITS[kind] // 256 + 1024


def new_data_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def seal(key: bytes, kind: Kind, name: str, plain: bytes) -> bytearray:
    """One object for the store: compressed, then encrypted under `key`, bound to `kind` and `name`."""
    head = _HEAD.pack(_MAGIC, FORMAT, kind)
    return _encrypt(key, head, name, plain, kind)


def unseal(key: bytes, kind: Kind, name: str, data: bytes | memoryview) -> bytes:
    """The plain body. Raises Untrusted for anything that `seal` did not make with this key, kind and name."""
    return bytes(unseal_into(bytearray(), key, kind, name, data))


def unseal_into(
    scratch: bytearray, key: bytes, kind: Kind, name: str, data: bytes | memoryview
) -> bytes | memoryview:
    """As `unseal`, with memory that is used again: the body may lie in `scratch`, which is made larger if it must be.

    New memory for each of a transfer's thousand objects, cleared and met cold, is a tenth of a download's time.
    """
    head = _check_head(data, _HEAD.size, kind, name)
    return _decrypt(scratch, key, head + name.encode(), memoryview(data)[_HEAD.size :], kind, name)


@dataclass(frozen=True, slots=True)
class Opened:
    """A signed object that was opened: its body, who signed it, and the data key of what it names."""

    body: bytes
    epoch: Epoch
    data_key: bytes


def seal_signed(keyring: Keyring, kind: Kind, name: str, plain: bytes, data_key: bytes) -> bytes:
    """One signed object, by the keyring's writing epoch."""
    epoch = keyring.writer
    wrapped = keyring.wrapper(epoch).wrap(name, data_key)
    head = _SIGNED_HEAD.pack(_MAGIC, FORMAT, kind, epoch.id, len(wrapped)) + wrapped
    sealed = bytes(_encrypt(data_key, head, name, plain, kind))
    return sealed + epoch.private_key.sign(_signed_message(name, sealed))


def unseal_signed(keyring: Keyring, kind: Kind, name: str, data: bytes | memoryview) -> Opened:
    """Raises Untrusted unless the node or its region signed exactly this object under exactly this name."""
    _check_head(data, _SIGNED_HEAD.size + _SIGNATURE, kind, name)
    _, _, _, signer, wrapped_size = _SIGNED_HEAD.unpack_from(data)
    epoch = keyring.epoch(signer, name)
    sealed, signature = bytes(data[:-_SIGNATURE]), bytes(data[-_SIGNATURE:])
    try:
        epoch.public_key.verify(signature, _signed_message(name, sealed))
    except InvalidSignature:
        raise Untrusted(
            f"the signature of {name} is wrong: it was changed, or is a copy of another object"
        ) from None
    body_at = _SIGNED_HEAD.size + wrapped_size
    data_key = keyring.wrapper(epoch).unwrap(name, sealed[_SIGNED_HEAD.size : body_at])
    bound = sealed[:body_at] + name.encode()
    body = _decrypt(bytearray(), data_key, bound, memoryview(sealed)[body_at:], kind, name)
    return Opened(bytes(body), epoch, data_key)


def _signed_message(name: str, sealed: bytes) -> bytes:
    return b"relume signed object 1\n" + name.encode() + b"\n" + sealed


def _check_head(data: bytes | memoryview, least: int, kind: Kind, name: str) -> bytes:
    if len(data) < least + _NONCE + _TAG or data[: len(_MAGIC)] != _MAGIC:
        raise Untrusted(f"{name} is not an object of relume, or was cut short ({len(data)} bytes)")
    _, version, found = _HEAD.unpack_from(data)
    if version != FORMAT:
        raise Untrusted(
            f"{name} has format version {version}; this relume reads version {FORMAT}",
            hint="Another version of relume wrote it. Use the same version on all nodes of a region.",
        )
    if found != kind:
        raise Untrusted(f"{name} is an object of kind {found}, not {kind.name.lower()}")
    return bytes(data[: _HEAD.size])


def _encrypt(key: bytes, head: bytes, name: str, plain: bytes, kind: Kind) -> bytearray:
    """`head`, a nonce, and `plain` packed and encrypted."""
    if len(plain) > LIMITS[kind]:
        raise Untrusted(
            f"{name} would have {len(plain)} bytes; a {kind.name.lower()} has at most {LIMITS[kind]}"
        )
    packed, nonce = _pack(plain), secrets.token_bytes(_NONCE)
    begin = len(head) + _NONCE
    sealed = bytearray(begin + len(packed) + _TAG)
    sealed[:begin] = head + nonce
    AESGCM(key).encrypt_into(nonce, packed, head + name.encode(), memoryview(sealed)[begin:])
    return sealed


def _pack(plain: bytes) -> bytes:
    """One zstd frame; where compressing is not worth its time, of raw blocks (RFC 8878, 3.1.1)."""
    if len(plain) > _SAMPLES * _SAMPLE:
        step = (len(plain) - _SAMPLE) // (_SAMPLES - 1)
        sample = b"".join(plain[at * step : at * step + _SAMPLE] for at in range(_SAMPLES))
        if len(zstd.compress(sample, _LEVEL)) > _WORTH_IT * len(sample):
            return _raw_frame(plain)
    return zstd.compress(plain, _LEVEL)


def _raw_frame(plain: bytes) -> bytes:
    """`plain`, which is not empty, as it is."""
    parts: list[bytes | memoryview] = [_RAW_FRAME, len(plain).to_bytes(4, "little")]
    view = memoryview(plain)
    for at in range(0, len(plain), _BLOCK):
        block = view[at : at + _BLOCK]
        parts += [_raw_block_head(len(block), last=at + _BLOCK >= len(plain)), block]
    return b"".join(parts)


def _raw_block_head(size: int, *, last: bool) -> bytes:
    return (size << 3 | last).to_bytes(3, "little")


def _out_of_raw_frame(packed: memoryview, size: int) -> memoryview | None:
    """What `_raw_frame` was given, moved together in place; None for another frame, which is zstd's to unpack.

    Weights are of this shape, and zstd takes longer to copy them than it takes to decrypt them.
    """
    head = len(_RAW_FRAME) + 4
    blocks = [  # of each: where it goes, where its three bytes of head are, its length
        (at, head + at + 3 * number, min(_BLOCK, size - at))
        for number, at in enumerate(range(0, size, _BLOCK))
    ]
    if packed[: len(_RAW_FRAME)] != _RAW_FRAME or len(packed) != head + 3 * len(blocks) + size:
        return None
    for at, begin, length in blocks:
        if packed[begin : begin + 3] != _raw_block_head(length, last=at + length == size):
            return None
    for at, begin, length in blocks:
        packed[at : at + length] = packed[begin + 3 : begin + 3 + length]
    return packed[:size]


def _decrypt(
    scratch: bytearray, key: bytes, bound: bytes, sealed: memoryview, kind: Kind, name: str
) -> bytes | memoryview:
    length = len(sealed) - _NONCE - _TAG
    if length > stored_limit(kind):
        raise Untrusted(f"{name} has {length} bytes; no {kind.name.lower()} is that large")
    if len(scratch) < length:
        scratch[:] = bytes(length)
    packed = memoryview(scratch)[:length]
    try:
        AESGCM(key).decrypt_into(bytes(sealed[:_NONCE]), sealed[_NONCE:], bound, packed)
    except InvalidTag:
        raise Untrusted(f"{name} does not decrypt: it was changed, moved, or made with another key") from None
    try:
        size = zstd.get_frame_info(packed).decompressed_size
        if size is None or size > LIMITS[kind]:
            raise Untrusted(
                f"{name} unpacks to {size} bytes; a {kind.name.lower()} has at most {LIMITS[kind]}"
            )
        if (as_it_was := _out_of_raw_frame(packed, size)) is not None:
            return as_it_was
        unpacker = zstd.ZstdDecompressor()
        plain = unpacker.decompress(packed, max_length=size)
        if len(plain) != size or (not unpacker.eof and size) or unpacker.unused_data:
            raise Untrusted(f"{name} does not unpack to the {size} bytes it says")
    except zstd.ZstdError as error:
        raise Untrusted(f"{name} does not unpack: {error}") from None
    return plain
