"""The seam: what is retried, for how long, and what the caller is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore import exceptions as oe

from relume.errors import ConfigError, ObjectMissing, StoreError
from relume.store.exclusive import prove_exclusive
from relume.store.objects import Objects, Patience
from relume.store.upload import Throttle

QUICK = Patience(bound_s=0.5, first_wait_s=0.001, longest_wait_s=0.01)


def failing(
    monkeypatch: pytest.MonkeyPatch, verb: str, errors: list[Exception], *, after: bool = False
) -> list[int]:
    """Make `obstore.verb` raise `errors` in turn, before or after it did its work, and then succeed."""
    real: Callable[..., Any] = getattr(obstore, verb)
    calls = [0]

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if errors:
            if after:
                real(*args, **kwargs)
            raise errors.pop(0)
        return real(*args, **kwargs)

    monkeypatch.setattr(obstore, verb, sometimes)
    return calls


def test_get_put_list_delete() -> None:
    objects = Objects("memory:")
    objects.put("a/b", b"1")
    objects.put("a/b", b"22")
    objects.put("ab", b"3")
    assert bytes(objects.get("a/b", limit=10)) == b"22"
    assert [(info.name, info.size) for info in objects.list("a")] == [("a/b", 2)]
    assert [info.name for info in objects.list("")] == ["a/b", "ab"]
    assert objects.exists("a/b")
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")
    with pytest.raises(ObjectMissing):
        objects.get("a/b", limit=10)


def test_an_object_larger_than_its_kind_is_not_read() -> None:
    objects = Objects("memory:")
    objects.put("a", b"x" * 100)
    with pytest.raises(StoreError, match="100 bytes"):
        objects.get("a", limit=99)
    assert objects.counters.bytes_read == 0


def test_passing_trouble_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects("memory:", patience=QUICK)
    calls = failing(monkeypatch, "put", [oe.GenericError("503 Slow Down"), ConnectionResetError("reset")])
    objects.put("a", b"1")
    assert calls == [3]
    assert objects.counters.retries == 2


def test_a_store_that_stays_away_is_an_error_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects("memory:", patience=QUICK)
    failing(monkeypatch, "get", [oe.GenericError("503 Slow Down")] * 100_000)
    with pytest.raises(StoreError, match=r"did not get a within 0 s: 503 Slow Down"):
        objects.get("a", limit=1)


@pytest.mark.parametrize("error", [oe.PermissionDeniedError("403"), oe.UnauthenticatedError("401")])
def test_what_asking_again_cannot_cure_fails_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    objects = Objects("memory:", patience=QUICK)
    calls = failing(monkeypatch, "put", [error])
    with pytest.raises(StoreError, match="refused") as refusal:
        objects.put("a", b"1")
    assert "credentials" in refusal.value.hint
    assert calls == [1]


def test_create_says_who_made_it() -> None:
    objects = Objects("memory:")
    assert objects.create("a", b"mine")
    assert not objects.create("a", b"theirs")
    assert bytes(objects.get("a", limit=9)) == b"mine"


def test_create_whose_answer_was_lost_was_still_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Objects("memory:", patience=QUICK)
    failing(monkeypatch, "put", [ConnectionResetError("reset")], after=True)
    assert objects.create("a", b"mine")


def test_the_proof_passes_on_real_stores(tmp_path: Path) -> None:
    for url in ("memory:", f"file://{tmp_path}/store"):
        objects = Objects(url)
        prove_exclusive(objects)
        assert objects.list("probe") == []


def test_the_proof_catches_a_store_that_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *args, mode=None, **kwargs: real(*args, **kwargs))
    with pytest.raises(StoreError, match="ignores create-if-absent") as refusal:
        prove_exclusive(Objects("memory:"))
    assert "Use a store that honours" in refusal.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "",
        "store",
        "/var/store",
        "http://host/x",
        "file://host/path",
        "file:relative",
        "s3://",
        "s3:///x",
        "s3://b?endpoit=x",
    ],
)
def test_urls_that_cannot_be_meant(url: str) -> None:
    with pytest.raises(ConfigError):
        Objects(url)


def test_a_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 755"):
        Objects(f"file://{tmp_path}/open")


def test_profiles_of_aws_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relume.store._aws import profile_settings

    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert profile_settings(None) == {}
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = A\naws_secret_access_key = B%C\n"
        "[work]\naws_access_key_id = W\naws_secret_access_key = X\n"
    )
    (tmp_path / "config").write_text(
        "[default]\nregion = eu-1\n[profile work]\nregion = us-2\nendpoint_url = http://s3:9000\n"
        "[profile sso]\nsso_session = s\n"
    )
    assert profile_settings(None) == {"access_key_id": "A", "secret_access_key": "B%C", "region": "eu-1"}
    work = {"access_key_id": "W", "secret_access_key": "X", "region": "us-2", "endpoint": "http://s3:9000"}
    assert profile_settings("work") == work
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert profile_settings(None) == work
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from the environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "too")
    assert profile_settings(None) == {}
    with pytest.raises(ConfigError, match="sso_session"):
        profile_settings("sso")
    with pytest.raises(ConfigError, match="nobody"):
        profile_settings("nobody")
    for url in (
        "s3://bucket/prefix?profile=work&path_style=true",
        "s3://bucket?endpoint=https://s3.example:9000",
    ):
        assert Objects(url).url == url


def test_the_throttle_keeps_to_its_rate() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    throttle = Throttle(1000, clock=lambda: now[0], sleep=sleep)
    for _ in range(100):
        throttle.take(100)
    assert 8.8 <= now[0] <= 10.1
    Throttle(None, sleep=sleep).take(10**12)
