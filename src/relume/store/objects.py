"""Object storage, reduced to what the store needs: get, create-if-absent, replace, delete, list.

Everything else in this room goes through `Objects`. It guarantees that

- an object is there whole or not at all, and that `create` says the truth about who made it even when the
  answer to the first attempt was lost on the way;
- a failing server is asked again, with back-off and jitter, up to a bound in seconds, and after that the
  caller gets a `StoreError` that says what was asked of whom;
- bytes and requests are counted (a start's trace shows them).

It does not check what it reads: that is `envelope`'s work. A directory (`file:`) is made durable by fsync;
other stores are trusted to keep what they acknowledged.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import obstore
from obstore import exceptions as oe
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from relume.errors import ConfigError, ObjectMissing, StoreError, Untrusted
from relume.store._aws import profile_settings

T = TypeVar("T")
Data = bytes | bytearray
"""What is written is not copied (nor by `memory:`): leave it alone afterwards, a request given up may still send it."""

# What asking again cannot cure. obstore raises the built-in FileNotFoundError for a missing object.
_FINAL = (
    oe.PermissionDeniedError,
    oe.UnauthenticatedError,
    oe.NotSupportedError,
    oe.InvalidPathError,
    oe.UnknownConfigurationKeyError,
)
_EXISTS = (oe.AlreadyExistsError, oe.PreconditionError)
_S3_QUERY = {"endpoint", "path_style", "region", "profile"}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One listed object: size in bytes, `modified` in seconds since 1970 on the store's own clock."""

    name: str
    size: int
    modified: float


@dataclass(slots=True)
class Counters:
    """What went over the wire since the start, as the bodies' sizes. `retries` are attempts that failed."""

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, requests: int = 0, read: int = 0, written: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.requests += requests
            self.bytes_read += read
            self.bytes_written += written
            self.retries += retries


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a failing store is asked again: `bound_s` in all per object, `request_s` for one request."""

    bound_s: float = 60.0
    request_s: float = 30.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 5.0


class Objects:
    """A store, by URL. Safe to use from many threads at once.

    `file:///DIR` | `s3://BUCKET[/PREFIX][?endpoint=URL&path_style=true&region=R&profile=P]` |
    `gs://BUCKET[/PREFIX]` | `az://CONTAINER[/PREFIX]` | `memory:`. Credentials come from the usual environment
    variables (and for S3 from the profile files), never from the URL.

    Raises ConfigError for a URL that cannot be meant.
    """

    def __init__(self, url: str, *, patience: Patience | None = None) -> None:
        self.url = url
        self.patience = patience or Patience()
        self.counters = Counters()
        self.directory: Path | None = None
        if url.startswith("file:"):
            self.directory = _private_directory(url)
        self._backend = self._fresh_backend = _connect(url, self.directory, self.patience, {})
        if url.startswith(("s3:", "gs:", "az:")):
            self._fresh_backend = _connect(url, None, self.patience, {"Cache-Control": "no-cache"})

    def get(self, name: str, *, limit: int, fresh: bool = False) -> memoryview:
        """The object's bytes. `fresh` asks caches on the way to pass the request on.

        Raises ObjectMissing, Untrusted for one larger than `limit` bytes (nothing of it is read), and StoreError for a
        store that does not answer.
        """
        backend = self._fresh_backend if fresh else self._backend

        def attempt() -> memoryview:
            answer = obstore.get(backend, name)
            size = answer.meta["size"]
            if size > limit:
                raise Untrusted(
                    f"{name} in {self.url} has {size} bytes; nothing of its kind is larger than {limit}",
                    hint="Somebody else writes to this store, or the object is damaged.",
                )
            data = memoryview(answer.bytes())  # not copied
            if len(data) != size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
            return data

        data = self._ask(f"get {name}", name, attempt)
        self.counters.add(read=len(data))
        return data

    def exists(self, name: str) -> bool:
        try:
            self._ask(f"look for {name}", name, lambda: obstore.head(self._backend, name))
        except ObjectMissing:
            return False
        return True

    def create(self, name: str, data: Data) -> bool:
        """Make the object unless one of that name exists; True when this call made it.

        An answer lost on the way makes the second attempt find the first one's object: what is there is
        compared with `data`, so `data` must be unlike what anybody else would write under the name.
        """
        try:
            self._ask(f"create {name}", name, lambda: obstore.put(self._backend, name, data, mode="create"))
        except _EXISTS:
            try:
                return bytes(self.get(name, limit=len(data))) == data
            except (ObjectMissing, StoreError):
                return False
        self._written(name, data)
        return True

    def put(self, name: str, data: Data) -> None:
        """Make or replace the object. Only for what means the same whoever writes it (chunks, layers)."""
        self._ask(f"put {name}", name, lambda: obstore.put(self._backend, name, data, use_multipart=False))
        self._written(name, data)

    def delete(self, name: str) -> None:
        """Remove the object; one that is not there is no error."""
        try:
            self._ask(f"delete {name}", name, lambda: obstore.delete(self._backend, name))
        except ObjectMissing:
            pass

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Every object below the folder `prefix`, in order of name."""

        def attempt() -> list[ObjectInfo]:
            return [
                ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())
                for batch in obstore.list(self._backend, prefix.rstrip("/") or None)
                for meta in batch
            ]

        return sorted(self._ask(f"list {prefix}", prefix, attempt), key=lambda info: info.name)

    def _written(self, name: str, data: Data) -> None:
        self.counters.add(written=len(data))
        if self.directory is not None:  # obstore's LocalStore neither syncs nor sets modes
            path = self.directory / name
            with path.open("rb") as file:
                os.fchmod(file.fileno(), 0o600)
                os.fsync(file.fileno())

    def _ask(self, what: str, name: str, attempt: Callable[[], T]) -> T:
        """Run `attempt` until it succeeds, fails for good, or the bound is reached."""
        until = time.monotonic() + self.patience.bound_s
        for wait in self._waits():
            self.counters.add(requests=1)
            try:
                return attempt()
            except FileNotFoundError:
                raise ObjectMissing(f"{name} is not in {self.url}") from None
            except (StoreError, *_EXISTS):
                raise
            except _FINAL as error:
                raise StoreError(
                    f"{self.url} refused to {what}: {_first_line(error)}",
                    hint="Check the store's URL, its credentials and what they may do.",
                ) from error
            except (oe.BaseError, OSError) as error:
                if time.monotonic() + wait >= until:
                    raise StoreError(
                        f"{self.url} did not {what} within {self.patience.bound_s:.0f} s: {_first_line(error)}",
                        hint="Look whether the store can be reached from this machine; nothing half done is visible.",
                    ) from error
                self.counters.add(retries=1)
                time.sleep(wait)
        raise AssertionError("unreachable: the waits never end")

    def _waits(self) -> Iterator[float]:
        """Exponential back-off with full jitter, as in AWS's "Exponential Backoff And Jitter"."""
        longest = self.patience.first_wait_s
        while True:
            yield random.uniform(longest / 4, longest)
            longest = min(longest * 2, self.patience.longest_wait_s)


def _first_line(error: BaseException) -> str:
    """obstore appends a Debug dump after an empty line."""
    return str(error).strip().split("\n", 1)[0]


def _private_directory(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/"):
        raise ConfigError(f"store url {url!r} is not file:///ABSOLUTE/DIRECTORY")
    directory = Path(unquote(parts.path))
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = directory.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(f"store directory {directory}: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(
            f"store directory {directory} has mode {mode:o}; others could read checkpoints or replace them",
            hint=f"chmod 700 {directory}",
        )
    return directory


def _connect(url: str, directory: Path | None, patience: Patience, headers: dict[str, str]) -> Any:
    if url in ("memory:", "memory://", "memory:///"):
        return MemoryStore()
    if directory is not None:
        return LocalStore(directory)
    parts = urlsplit(url)
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=patience.request_s),
            "connect_timeout": timedelta(seconds=min(10.0, patience.request_s)),
            "default_headers": headers,
        },
        "retry_config": {"max_retries": 0},  # Objects._ask is the one place that retries
        "prefix": unquote(parts.path).strip("/") or None,
    }
    if not parts.netloc:
        raise ConfigError(
            f"store url {url!r} is not one of file:, s3:, gs:, az:, memory:",
            hint="For example file:///var/lib/relume/store or s3://bucket/prefix?endpoint=http://host:9000&path_style=true",
        )
    query = dict(parse_qsl(parts.query))
    try:
        if parts.scheme == "s3":
            if unknown := set(query) - _S3_QUERY:
                raise ConfigError(
                    f"store url {url!r}: unknown {', '.join(sorted(unknown))}",
                    hint=f"Known: {sorted(_S3_QUERY)}",
                )
            return S3Store(parts.netloc, **_s3_settings(query, options))
        if parts.scheme == "gs":
            return GCSStore(parts.netloc, **options)
        if parts.scheme == "az":
            return AzureStore(container_name=parts.netloc, **options)
    except oe.BaseError as error:
        raise ConfigError(f"store url {url!r}: {_first_line(error)}") from error
    raise ConfigError(f"store url {url!r} is not one of file:, s3:, gs:, az:, memory:")


def _s3_settings(query: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Query beats environment (read by obstore itself) beats profile files, as in AWS's own tools."""
    settings = profile_settings(query.get("profile"))
    if endpoint := query.get("endpoint"):
        settings["endpoint"] = endpoint
    if region := query.get("region"):
        settings["region"] = region
    # Objects authenticate themselves, so the SHA-256 of what is sent would only cost: a fifth of an upload's processor
    # time. Presigned URLs sign no body either, so servers know it.
    settings["unsigned_payload"] = True
    # DeleteObjects (POST ?delete) is not implemented by all servers; DeleteObject is (arrow-rs-object-store #731).
    settings["disable_bulk_delete"] = True
    if query.get("path_style", "").lower() in ("1", "true", "yes"):
        settings["virtual_hosted_style_request"] = False
    if settings.get("endpoint", os.environ.get("AWS_ENDPOINT_URL", "")).startswith("http:"):
        options["client_options"]["allow_http"] = True
    return {**settings, **options}
