"""Where builds lie on this node: layers by content, what inputs gave which layer, builds by id.

::

    layers/DIGEST/        a tree, never written again
    index/KIND/KEY.json   what a stage with these inputs gave: {"layer": DIGEST, "facts": {...}}
    builds/BUILD_ID.json  a Build
    builds-by-inputs/INPUTS.json  {"build_id": ...}, the newest build of these inputs
    cache/APP/            package tools' download caches, one set for each app
    tmp/NAME/             one build's scratch; locks/workspace-NAME is locked while its builder lives

Guarantees: everything is made under another name and renamed, a layer before the index entry that names it, both
before the build that needs them; a reader never sees half of one. Two builders, in one process or in two,
never make the same thing at the same time. A crash leaves only tmp/ entries that nobody locks. A build is on
disk before it is named: one syncfs(2) for all its layers, until then index entries hold for this boot only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from relume.build import tree
from relume.build.interrupt import in_thread
from relume.build.model import Build, Layer
from relume.errors import BuildError, HostError, Untrusted
from relume.linux import mounts, process, syscall

_POLL = 0.1
_KEPT_WITHOUT_BUILD = "base"


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """What a stage gave: a layer and what is worth knowing of it (versions, image config)."""

    layer: Layer
    facts: Mapping[str, Any]


class Depot:
    """The directory ``root`` and everything in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = root / "layers"
        self.tmp = root / "tmp"
        self._volatile: list[Path] = []
        for name in ("layers", "index", "builds", "builds-by-inputs", "cache", "locks", "tmp"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    # --- locks ------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def lock(self, name: str, *, shared: bool = False) -> AsyncIterator[None]:
        """Hold the lock ``name`` against other tasks, builders and processes (flock(2)).

        Polled, because a thread that waits in flock could not be cancelled.
        """
        fd = os.open(self.root / "locks" / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            while not _try_lock(fd, shared=shared):  # noqa: ASYNC110  (another process frees it)
                await asyncio.sleep(_POLL)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A scratch directory of one build; gone at the end, with every mount in it."""
        name = uuid.uuid4().hex[:16]
        lock, path = self._workspace_lock(name), self.tmp / name
        fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            _try_lock(fd, shared=False)  # before the directory is there, or a cleaner might take it
            path.mkdir(mode=0o700)
            yield path
        finally:
            try:
                discard(path)
                lock.unlink()
            finally:
                os.close(fd)

    def abandoned(self) -> list[Path]:
        """Scratch directories whose builder no longer lives."""
        return [path for path in sorted(self.tmp.iterdir()) if not self._alive(path.name)]

    def _alive(self, name: str) -> bool:
        try:
            fd = os.open(self._workspace_lock(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            return not _try_lock(fd, shared=False)
        finally:
            os.close(fd)

    def drop(self, workspace: Path) -> None:
        """Remove an abandoned scratch directory."""
        discard(workspace)
        self._workspace_lock(workspace.name).unlink(missing_ok=True)

    def _workspace_lock(self, name: str) -> Path:
        return self.root / "locks" / f"workspace-{name}"

    # --- layers and what they were made from --------------------------------------------------------

    async def publish(self, made: Path, expected: str | None = None) -> Layer:
        """Move the finished tree ``made`` (on this file system) to its place by content.

        Raises Untrusted for a tree that came from elsewhere and is not the ``expected`` one.
        """

        def work(check: Any) -> Layer:
            digest = tree.digest(made, check)
            if expected not in (None, digest):
                raise Untrusted(f"layer {expected} came with other content, {digest}")
            layer = Layer(digest, self.layers / digest)
            if layer.path.is_dir() and tree.digest(layer.path, check) != digest:
                layer.path.rename(made.with_name("torn"))  # by a power cut: goes with the workspace
            try:
                made.rename(layer.path)
            except OSError:
                if not layer.path.is_dir():  # else the same content was there already
                    raise
            return layer

        return await in_thread(work)

    def layer(self, digest: str) -> Layer:
        """A layer that is here. Raises BuildError where it is not."""
        path = self.layers / digest
        if len(digest) != 64 or not path.is_dir():
            raise BuildError(f"layer {digest[:12]} is gone from {self.layers}", hint="deploy the app again")
        return Layer(digest, path)

    def lookup(self, kind: str, key: str) -> Made | None:
        """What a stage ``kind`` with the inputs ``key`` gave; None if never made or no longer here."""
        data = self._entry(self.root / "index" / kind / f"{key}.json")
        return Made(self.layer(data["layer"]), data.get("facts") or {}) if data else None

    def record(self, kind: str, key: str, made: Made) -> None:
        """Remember what a stage gave; for this boot of the machine, until ``make_durable``."""
        path = self.root / "index" / kind / f"{key}.json"
        path.parent.mkdir(exist_ok=True, mode=0o700)
        entry = {"layer": made.layer.digest, "facts": dict(made.facts)}
        _write(path, {**entry, "boot": process.boot_id()}, durable=False)
        self._volatile.append(path)

    def stages_of(self, layers: Iterable[Layer]) -> list[dict[str, Any]]:
        """What is known to have given these layers: ``kind``, ``key``, ``layer``, ``facts`` of each stage."""
        digests = {layer.digest for layer in layers}
        found = []
        for path in sorted((self.root / "index").glob("*/*.json")):
            entry = self._entry(path)
            if entry is not None and entry["layer"] in digests:
                found.append(
                    {
                        "kind": path.parent.name,
                        "key": path.stem,
                        "layer": entry["layer"],
                        "facts": entry.get("facts") or {},
                    }
                )
        return found

    async def make_durable(self, *, came: bool = False) -> None:
        """Bring all layers to disk, and let the index entries that wait for it outlive a power cut.

        ``came`` says that layers came without an entry."""
        waiting, self._volatile = self._volatile, []
        if not waiting and not came:
            return
        await asyncio.to_thread(_sync, self.root)
        for path in waiting:
            if data := _read(path):
                data.pop("boot", None)
                _write(path, data)

    def _entry(self, path: Path) -> dict[str, Any] | None:
        """An index entry that still holds."""
        data = _read(path)
        if data is None or data.get("boot", process.boot_id()) != process.boot_id():
            return None
        return data if (self.layers / str(data.get("layer"))).is_dir() else None

    # --- builds -------------------------------------------------------------------------------------

    def save(self, build: Build) -> None:
        """Write a build, and make it the newest of its inputs."""
        _write(self.root / "builds" / f"{build.build_id}.json", build.as_dict())
        newest = self.root / "builds-by-inputs" / f"{build.inputs_digest}.json"
        _write(newest, {"build_id": build.build_id})

    def load(self, build_id: str) -> Build | None:
        """A build with all its layers; None if there is none of that id or a layer is gone."""
        if not build_id.isalnum():
            return None
        data = _read(self.root / "builds" / f"{build_id}.json")
        if data is None:
            return None
        try:
            build = Build.from_dict(data, self.layers)
        except (KeyError, TypeError):
            return None
        return build if all(layer.path.is_dir() for layer in build.layers) else None

    def newest(self, inputs_digest: str) -> Build | None:
        """The build that these inputs gave last."""
        data = _read(self.root / "builds-by-inputs" / f"{inputs_digest}.json")
        return self.load(str(data["build_id"])) if data and "build_id" in data else None

    def builds(self) -> list[Build]:
        """All builds, oldest first."""
        found = [self.load(path.stem) for path in (self.root / "builds").glob("*.json")]
        return sorted((build for build in found if build), key=lambda build: build.created_at)

    def forget(self, build: Build) -> None:
        """Remove a build's record, and what only its app used; layers go with ``sweep``."""
        (self.root / "builds" / f"{build.build_id}.json").unlink(missing_ok=True)
        newest = self.root / "builds-by-inputs" / f"{build.inputs_digest}.json"
        if (data := _read(newest)) and data.get("build_id") == build.build_id:
            newest.unlink(missing_ok=True)
        if all(other.app != build.app for other in self.builds()):
            shutil.rmtree(self.root / "cache" / build.app, ignore_errors=True)

    def sweep(self, kept: frozenset[str] = frozenset()) -> list[str]:
        """Remove layers that no build needs, but ``kept`` and downloaded bases; returns their digests.

        Does nothing while a build is in the making (its layers belong to no build yet).
        """
        fd = os.open(self.root / "locks" / "builds", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if not _try_lock(fd, shared=False):
                return []
            needed = set(kept) | {layer.digest for build in self.builds() for layer in build.layers}
            for path in (self.root / "index").glob(f"{_KEPT_WITHOUT_BUILD}/*.json"):
                needed.add(str((self._entry(path) or {}).get("layer")))
            gone = [path for path in self.layers.iterdir() if path.name not in needed]
            for path in gone:
                doomed = self.tmp / f"gone-{path.name}"
                path.rename(doomed)  # at once invisible to lookups
                discard(doomed)
            for path in (self.root / "index").glob("*/*.json"):
                if self._entry(path) is None:
                    path.unlink(missing_ok=True)
            return [path.name for path in gone]
        finally:
            os.close(fd)


def _write(path: Path, data: Mapping[str, Any], *, durable: bool = True) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        json.dump(data, file, indent=1)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.rename(path)
    if durable:
        _sync_directory(path.parent)


def discard(path: Path) -> None:
    """Remove a directory of ours and unmount what is mounted below it.

    Raises HostError rather than delete through a mount that would not go away.
    """
    mounts.unmount_all(path)
    if mounts.under(path):
        raise HostError(f"{path}: a mount below it cannot be removed", hint=f"umount -l {path}/*")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _try_lock(fd: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _sync(path: Path) -> None:
    """syncfs(2): a layer is on disk before its name is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if syscall.libc().syncfs(fd) != 0:
            raise syscall.error(str(path))
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
