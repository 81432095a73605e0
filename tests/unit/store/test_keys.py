"""Key files: private, never overwritten, rotated, and never quoted in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.errors import ConfigError, Untrusted
from relume.store.envelope import Kind, seal_signed, unseal_signed
from relume.store.keys import (
    ENVIRONMENT,
    Keyring,
    SecretWrapper,
    load_key_file,
    load_own_key,
    load_region_key,
    new_key_file,
    parse_keys,
    rotate_key_file,
)


def test_a_new_key_file_is_private_and_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "region.key"
    epoch = new_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key_file(path) == (epoch,)
    with pytest.raises(ConfigError):
        new_key_file(path)
    assert load_key_file(path) == (epoch,)


def test_rotation_keeps_the_old_readable(tmp_path: Path) -> None:
    path = tmp_path / "region.key"
    old = new_key_file(path)
    signed = seal_signed(Keyring(load_key_file(path)), Kind.BUILD, "n", b"old", b"d" * 32)
    new = rotate_key_file(path)
    ring = Keyring(load_key_file(path))
    assert ring.writer == new
    assert unseal_signed(ring, Kind.BUILD, "n", signed).epoch == old
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Untrusted):
        unseal_signed(Keyring((new,)), Kind.BUILD, "n", signed)


SHORT = '{"relume_key": 1, "epochs": [{"signing": "5ec3e7", "secret": "5ec3e7"}]}'


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"relume_key": 1, "epochs": []}', '{"relume_key": 2}', SHORT]
)
def test_what_is_no_key_file_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_keys(text, "the file")
    assert "5ec3e7" not in str(error.value) + error.value.hint


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "region.key"
    new_key_file(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="mode 640"):
        load_key_file(path)


def test_the_region_key_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "region.key"
    epoch = new_key_file(path)
    monkeypatch.setenv(ENVIRONMENT, path.read_text())
    assert load_region_key(None) == (epoch,)
    monkeypatch.delenv(ENVIRONMENT)
    assert load_region_key(None) == ()


def test_the_nodes_own_key_is_made_once(tmp_path: Path) -> None:
    assert load_own_key(tmp_path / "node.key") == load_own_key(tmp_path / "node.key")


def test_a_wrapped_key_opens_for_its_name_only(tmp_path: Path) -> None:
    wrapper = SecretWrapper(new_key_file(tmp_path / "key"))
    wrapped = wrapper.wrap("a", b"k" * 32)
    assert wrapper.unwrap("a", wrapped) == b"k" * 32
    for name, bad in (("b", wrapped), ("a", wrapped[:-1]), ("a", b"")):
        with pytest.raises(Untrusted):
            wrapper.unwrap(name, bad)


def test_keys_are_never_printed(tmp_path: Path) -> None:
    epoch = new_key_file(tmp_path / "key")
    for text in (repr(epoch), str(epoch)):
        assert epoch.secret.hex() not in text
        assert repr(epoch.secret) not in text
        assert repr(epoch.signing) not in text


def test_purposes_have_keys_of_their_own(tmp_path: Path) -> None:
    epoch = new_key_file(tmp_path / "key")
    purposes = ["wrap", "tenant", "id a", "id b", "cut a", "chunk a 00", "chunk a 01"]
    assert len({epoch.derive(purpose) for purpose in purposes}) == len(purposes)
