"""The checkpoints of this node, as directories.

``ROOT/CHECKPOINT_ID/`` holds ``images/`` (CRIU's), ``held/`` (files that come along), ``integrity.json``,
``working-set`` once learned, and ``checkpoint.json`` (:class:`Checkpoint`). One in the making is
``ROOT/.making-DUMP_ID/`` with ``intent.json`` and CRIU's ``work/``. A directory gets its final name by rename,
after everything in it is on disk: what has a name is whole.

Whole checkpoints that the region's cache holds count as here too: they are linked, and stay the cache's.

Failures to restore and quarantine are in ``health.json`` beside it; losing that file costs a retry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relume.checkpoint import staging
from relume.checkpoint.platform import Platform
from relume.errors import NotFound
from relume.linux.affinity import Affinity

_NAME = re.compile(r"cp-[A-Za-z0-9._-]{1,100}")

_TRIES = 20

RECORD = "checkpoint.json"

QUARANTINE_AFTER = 2
"""Failed restores after which a checkpoint no longer counts as existing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a finished checkpoint. Sizes are bytes, times seconds."""

    checkpoint_id: str
    app: str
    build_id: str
    instance_id: str
    platform: Platform
    created_at: float
    size_bytes: int
    needs_network: bool
    """Some socket that stays is bound or connected beyond loopback: eth0 must be there before it is restored."""
    lazy_bytes: int
    """What all processes together have in pages that can come on demand, in bytes; shared ones count for each."""
    frozen_s: float
    timings: dict[str, float]
    id_base: int
    loopback: str
    filesystem: str
    processes: list[dict[str, Any]]
    stopped: list[int]
    """Pids inside of those that were stopped (SIGSTOP) when it was taken, and must stay so."""
    left_behind: dict[str, Any]
    warnings: list[str]
    affinity: Affinity = dataclasses.field(default_factory=list)
    """Threads (pids inside) that were kept from some processors: see relume.linux.affinity."""
    memory: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """``pid``, ``what`` and ``saved_bytes`` (relume.images.mappings), the largest first."""
    gpu: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The GPUs it was taken on and what was put away of them (relume.checkpoint.device); empty without one."""
    own_files: list[str] = dataclasses.field(default_factory=list)
    """Where the whole layer was saved: what each copy needs in its own all the same (relume.engine.held)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Intent:
    """Who is making a checkpoint of what: written before the dump, read by a node that finds it unfinished."""

    dump_id: str
    instance_id: str
    app: str
    build_id: str
    started_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """How restores of one checkpoint went on this node."""

    failures: int = 0
    quarantined: bool = False
    reason: str = ""


class Shelf:
    """All checkpoints of one node."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._linked: dict[str, Path] = {}
        self._aside: dict[str, str] = {}
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def directory(self, checkpoint_id: str) -> Path:
        """Where a finished checkpoint lies. Raises NotFound for a name that is none of ours."""
        if not _NAME.fullmatch(checkpoint_id):
            raise NotFound(f"no checkpoint {checkpoint_id!r}", hint="relume checkpoints ls shows them")
        return self._linked.get(checkpoint_id) or self.root / checkpoint_id

    def link(self, checkpoint_id: str, directory: Path) -> None:
        """Count a checkpoint elsewhere on this disk as here; one of this node's own by that name goes first."""
        if not (self.directory(checkpoint_id) / RECORD).exists():
            self._linked[checkpoint_id] = directory

    def unlink(self, checkpoint_id: str) -> None:
        """The reverse of :meth:`link`; for one that is not linked nothing happens."""
        self._linked.pop(checkpoint_id, None)

    def set_aside(self, checkpoint_id: str, reason: str) -> None:
        """Not to be used until the node restarts; it stays on the disk."""
        self._aside[checkpoint_id] = reason

    def why_aside(self, checkpoint_id: str) -> str | None:
        """The reason of :meth:`set_aside`; None for one that may be used."""
        return self._aside.get(checkpoint_id)

    # --- making -----------------------------------------------------------------------------------

    def begin(self, *, instance_id: str, app: str, build_id: str, now: float) -> tuple[Path, Intent]:
        """A fresh directory for a checkpoint in the making. Raises OSError (then there is none)."""
        intent = Intent(secrets.token_hex(6), instance_id, app, build_id, now)
        directory = self.making(intent.dump_id)
        directory.mkdir(mode=0o700)
        try:
            (directory / "intent.json").write_text(json.dumps(dataclasses.asdict(intent)))
        except OSError:
            self.abandon(intent.dump_id)
            raise
        return directory, intent

    def making(self, dump_id: str) -> Path:
        return self.root / f".making-{dump_id}"

    def unfinished(self) -> list[Intent]:
        """The checkpoints in the making. A directory without a readable intent is left alone: it is just
        beginning, or about to get its name."""
        found = []
        for directory in self.root.glob(".making-*"):
            try:
                found.append(Intent(**json.loads((directory / "intent.json").read_text())))
            except (OSError, ValueError, TypeError):
                continue
        return found

    def clear_half_made(self) -> None:
        """Remove what a node that died left half made. Only while nothing of this node is making one."""
        intents = {self.making(intent.dump_id) for intent in self.unfinished()}
        for directory in self.root.glob(".making-*"):
            if directory not in intents:
                staging.drop(directory)
                shutil.rmtree(directory, ignore_errors=True)

    def completed(self, dump_id: str) -> Checkpoint | None:
        """One in the making that needs nothing more than to be published."""
        try:
            return read(self.making(dump_id))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def abandon(self, dump_id: str) -> None:
        """Leave nothing of a checkpoint that did not come to be."""
        directory = self.making(dump_id)
        staging.drop(directory)
        for _ in range(_TRIES):  # a CRIU whose keeper was killed may write there until it is ended
            shutil.rmtree(directory, ignore_errors=True)
            if not directory.exists():
                break

    def publish(self, dump_id: str, checkpoint: Checkpoint) -> None:
        """Make it visible: everything to disk, then the name. Raises OSError (then nothing is visible).

        May be cut short anywhere and done again.
        """
        directory = self.making(dump_id)
        close_to_others(directory / "images")
        (directory / RECORD).write_text(json.dumps(dataclasses.asdict(checkpoint)))
        shutil.rmtree(directory / "work", ignore_errors=True)
        _sync_tree(directory)
        finished = self.directory(checkpoint.checkpoint_id)
        directory.rename(finished)
        try:
            _sync(self.root)
        except OSError:
            pass  # it is there and whole; only a power failure right now could take its name back
        (finished / "intent.json").unlink(missing_ok=True)

    # --- finding ----------------------------------------------------------------------------------

    def load(self, checkpoint_id: str) -> Checkpoint:
        """Raises NotFound when it is not there or not readable."""
        try:
            return read(self.directory(checkpoint_id))
        except (OSError, ValueError, TypeError, KeyError):
            raise NotFound(
                f"no checkpoint {checkpoint_id}", hint="relume checkpoints ls shows them"
            ) from None

    def all(self) -> list[Checkpoint]:
        """Every readable checkpoint, oldest first."""
        found = []
        for checkpoint_id in [path.name for path in self.root.glob("cp-*")] + list(self._linked):
            try:
                found.append(self.load(checkpoint_id))
            except NotFound:
                continue
        return sorted(found, key=lambda checkpoint: checkpoint.created_at)

    def unreadable(self) -> list[str]:
        """Names of directories that should be checkpoints and are not, e.g. of another version of relume."""
        known = {checkpoint.checkpoint_id for checkpoint in self.all()}
        return sorted(path.name for path in self.root.glob("cp-*") if path.name not in known)

    def of_build(self, build_id: str) -> list[Checkpoint]:
        return [checkpoint for checkpoint in self.all() if checkpoint.build_id == build_id]

    # --- health -----------------------------------------------------------------------------------

    def health(self, checkpoint_id: str) -> Health:
        try:
            return Health(**json.loads((self.directory(checkpoint_id) / "health.json").read_text()))
        except (OSError, ValueError, TypeError):
            return Health()

    def restore_failed(self, checkpoint_id: str, reason: str, *, damaged: bool) -> Health:
        """Count a failed restore; a damaged one is quarantined at once, others at the second time."""
        before = self.health(checkpoint_id)
        failures = before.failures + 1
        health = Health(failures, damaged or failures >= QUARANTINE_AFTER, reason)
        self._write_health(checkpoint_id, health)
        return health

    def restore_worked(self, checkpoint_id: str) -> None:
        """Forget earlier failures."""
        if self.health(checkpoint_id).failures:
            self._write_health(checkpoint_id, Health())

    def _write_health(self, checkpoint_id: str, health: Health) -> None:
        path = self.directory(checkpoint_id) / "health.json"
        try:
            path.with_suffix(".tmp").write_text(json.dumps(dataclasses.asdict(health)))
            path.with_suffix(".tmp").rename(path)
        except OSError:
            pass  # the checkpoint was removed meanwhile, or the disk is full

    # --- removing ---------------------------------------------------------------------------------

    def remove(self, checkpoint_id: str) -> None:
        """Remove one; running copies of it keep what they have open. Raises NotFound."""
        directory = self.directory(checkpoint_id)
        grave = self.root / f".removing-{checkpoint_id}"
        shutil.rmtree(grave, ignore_errors=True)  # of one that was fetched again after an interrupted removal
        try:
            directory.rename(grave)
        except FileNotFoundError:
            raise NotFound(
                f"no checkpoint {checkpoint_id}", hint="relume checkpoints ls shows them"
            ) from None
        shutil.rmtree(grave, ignore_errors=True)

    def sweep(self) -> None:
        """Finish what a crash interrupted: removals, and the last step of :meth:`publish`."""
        for grave in self.root.glob(".removing-*"):
            shutil.rmtree(grave, ignore_errors=True)
        for intent in self.root.glob("cp-*/intent.json"):
            intent.unlink(missing_ok=True)


def read(directory: Path) -> Checkpoint:
    """The record in a checkpoint's directory. Raises OSError, ValueError, TypeError or KeyError."""
    return from_json(json.loads((directory / RECORD).read_text()))


def from_json(raw: Mapping[str, Any]) -> Checkpoint:
    """The record as it is written. Raises TypeError or KeyError."""
    return Checkpoint(**{**raw, "platform": Platform.from_json(raw["platform"])})


def size_of(directory: Path) -> int:
    """Bytes on disk of all files below ``directory`` (holes do not count); of what lives, those that stay."""
    total = 0
    for parent, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512  # noqa: PTH118
    return total


def close_to_others(images: Path) -> None:
    """The host's root and its group only; why the group, see relume.node.ground."""
    images.chmod(0o750)
    for path in images.iterdir():
        path.chmod(0o640)


def _sync_tree(directory: Path) -> None:
    for parent, _, files in os.walk(directory):
        for name in files:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
