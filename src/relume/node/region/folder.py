"""What the region keeps in a checkpoint's folder beside the checkpoint's own files.

``region.json`` says under which name it is published, and how large the working set was that was published last;
losing it costs a look at the store. ``root.json`` has mode, owner and time of the held files' top folder, which is
the container's ``/``: the tar has what is in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

from relume.build import Build
from relume.checkpoint import shelf as shelves
from relume.checkpoint.shelf import Checkpoint
from relume.errors import Untrusted
from relume.store import CheckpointName, Fetched

_MARK = "region.json"
ROOT = "root.json"


def mark(directory: Path, name: CheckpointName, **more: Any) -> None:
    """Remember that it is published as ``name``."""
    found = read_mark(directory) | dataclasses.asdict(name) | more
    temporary = directory / f".{_MARK}"
    temporary.write_text(json.dumps(found))
    temporary.rename(directory / _MARK)


def read_mark(directory: Path) -> dict[str, Any]:
    """What :func:`mark` wrote; empty without."""
    try:
        found = json.loads((directory / _MARK).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def published(directory: Path) -> CheckpointName | None:
    """The name in the store of the checkpoint that lies here."""
    found = read_mark(directory)
    if "build" in found:
        return CheckpointName(found["build"], found["platform"], found["generation"])
    return None


def write_root(directory: Path) -> None:
    """Before an upload. Raises OSError."""
    found = (directory / "held").stat()
    root = {
        "mode": stat.S_IMODE(found.st_mode),
        "uid": found.st_uid,
        "gid": found.st_gid,
        "mtime_ns": found.st_mtime_ns,
    }
    (directory / ROOT).write_text(json.dumps(root))


def settle(directory: Path) -> None:
    """Make what was fetched like what a dump leaves. Raises Untrusted, OSError."""
    shelves.close_to_others(directory / "images")
    held = directory / "held"
    held.mkdir(mode=0o700, exist_ok=True)  # none is sent where it is empty
    try:
        root = json.loads((directory / ROOT).read_text())
        os.chown(held, root["uid"], root["gid"])
        held.chmod(root["mode"] & 0o7777)
        os.utime(held, ns=(root["mtime_ns"], root["mtime_ns"]))
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise Untrusted(f"{directory.name} has no usable {ROOT}: {error}") from None


def checkpoint_of(fetched: Fetched, build: Build) -> Checkpoint:
    """The record that came along. Raises Untrusted unless it is that of this build and fits the images' manifest."""
    name = fetched.manifest.name
    try:
        checkpoint = shelves.read(fetched.directory)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Untrusted(f"{name.id} has no usable {shelves.RECORD}: {error}") from None
    if (checkpoint.app, checkpoint.build_id) != (build.app, build.build_id) or name.build != build.build_id:
        raise Untrusted(f"{name.id} holds the checkpoint of another build, {checkpoint.build_id}")
    return checkpoint
