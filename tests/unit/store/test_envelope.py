"""Sealed and signed objects: only the right key, kind, name and bytes open them."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relume.errors import Untrusted
from relume.store import envelope
from relume.store.envelope import (
    LIMITS,
    Kind,
    new_data_key,
    seal,
    seal_signed,
    unseal,
    unseal_into,
    unseal_signed,
    zstd,
)
from relume.store.keys import Epoch, Keyring

EPOCH, OTHER = Epoch(b"s" * 32, b"k" * 32), Epoch(b"t" * 32, b"l" * 32)
RING = Keyring((EPOCH,))
KEY = b"d" * 32


@given(st.binary(max_size=20_000))
def test_round_trip(plain: bytes) -> None:
    assert unseal(KEY, Kind.INDEX, "n", seal(KEY, Kind.INDEX, "n", plain)) == plain
    opened = unseal_signed(RING, Kind.MANIFEST, "n", seal_signed(RING, Kind.MANIFEST, "n", plain, KEY))
    assert (opened.body, opened.epoch, opened.data_key) == (plain, EPOCH, KEY)


@pytest.mark.parametrize("size", [50_000, 131_072, 131_073, 300_000, 2 * 131_072, 4 << 20])
def test_what_does_not_compress_is_stored_as_it_is(size: int) -> None:
    noise = random.Random(size).randbytes(size)
    sealed = seal(KEY, Kind.CHUNK, "n", noise)
    assert size < len(sealed) < size + size // 4096 + 100
    assert unseal(KEY, Kind.CHUNK, "n", sealed) == noise
    assert unseal(KEY, Kind.CHUNK, "n", sealed) == zstd.decompress(envelope._pack(noise))
    assert len(seal(KEY, Kind.CHUNK, "n", bytes(range(250)) * (size // 250))) < size / 2


@given(st.lists(st.tuples(st.integers(0, 400_000), st.booleans()), min_size=1, max_size=6))
def test_memory_that_is_used_again_keeps_nothing_of_what_was_in_it(objects: list[tuple[int, bool]]) -> None:
    scratch = bytearray()
    for number, (size, noise) in enumerate(objects):
        plain = random.Random(number).randbytes(size) if noise else bytes([number]) * size
        assert unseal_into(scratch, KEY, Kind.CHUNK, "n", seal(KEY, Kind.CHUNK, "n", plain)) == plain


@pytest.mark.parametrize("at", [0, 4, 5, 9, 11, 12 + (128 << 10), 14 + (128 << 10)])
def test_a_frame_that_is_raw_but_for_one_bit_is_refused(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = bytearray(envelope._raw_frame(random.Random(1).randbytes(200_000)))
    frame[at] ^= 2  # magic, descriptor, size, head of the first block, of the second
    monkeypatch.setattr(envelope, "_pack", lambda plain: bytes(frame))
    sealed = seal(KEY, Kind.CHUNK, "n", b"")
    with pytest.raises(Untrusted):
        unseal(KEY, Kind.CHUNK, "n", sealed)


@given(st.data())
@settings(max_examples=300)
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    sealed = seal(KEY, Kind.CHUNK, "n", b"pages" * 50)
    signed = seal_signed(RING, Kind.MANIFEST, "n", b"{}" * 50, KEY)
    for good, opens in (
        (sealed, lambda bad: unseal(KEY, Kind.CHUNK, "n", bad)),
        (signed, lambda bad: unseal_signed(RING, Kind.MANIFEST, "n", bad)),
    ):
        at = data.draw(st.integers(0, len(good) - 1))
        flip = data.draw(st.integers(1, 255))
        bad = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
        with pytest.raises(Untrusted):
            opens(bad)
        with pytest.raises(Untrusted):
            opens(good[:at])
        with pytest.raises(Untrusted):
            opens(good + bytes([flip]))


def test_another_key_kind_or_name_does_not_open() -> None:
    sealed = seal(KEY, Kind.INDEX, "n", b"x")
    for key, kind, name in ((b"e" * 32, Kind.INDEX, "n"), (KEY, Kind.IMAGES, "n"), (KEY, Kind.INDEX, "m")):
        with pytest.raises(Untrusted):
            unseal(key, kind, name, sealed)
    signed = seal_signed(RING, Kind.MANIFEST, "n", b"x", KEY)
    for ring, kind, name in (
        (Keyring((OTHER,)), Kind.MANIFEST, "n"),
        (RING, Kind.BUILD, "n"),
        (RING, Kind.MANIFEST, "m"),
    ):
        with pytest.raises(Untrusted):
            unseal_signed(ring, kind, name, signed)


def test_another_version_is_named() -> None:
    sealed = bytearray(seal(KEY, Kind.INDEX, "n", b"x"))
    sealed[6] = 2
    with pytest.raises(Untrusted, match="format version 2"):
        unseal(KEY, Kind.INDEX, "n", bytes(sealed))


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setitem(LIMITS, Kind.CHUNK, 1 << 30)
        bomb = seal(KEY, Kind.CHUNK, "n", bytes(64 << 20))
    with pytest.raises(Untrusted, match="at most"):
        unseal(KEY, Kind.CHUNK, "n", bomb)


def test_a_frame_that_lies_about_its_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = zstd.compress(b"a" * 1000, 1)
    size_at = 5  # single-segment frame: magic 4, descriptor 1, then the content size (RFC 8878, 3.1.1.1)
    lying = honest[:size_at] + struct.pack("<H", 500 - 256) + honest[size_at + 2 :]
    assert zstd.get_frame_info(lying).decompressed_size == 500
    with monkeypatch.context() as context:
        context.setattr(envelope.zstd, "compress", lambda plain, level: lying)
        sealed = seal(KEY, Kind.CHUNK, "n", b"")
    with pytest.raises(Untrusted):
        unseal(KEY, Kind.CHUNK, "n", sealed)


def test_equal_bytes_are_never_sealed_alike() -> None:
    assert seal(KEY, Kind.CHUNK, "n", b"x") != seal(KEY, Kind.CHUNK, "n", b"x")
    assert new_data_key() != new_data_key()
