"""The newest generation this node has seen of each checkpoint, so that a store cannot take it back to an old one.

Without it somebody who can write to the store, and has no key, could delete the newest manifest and leave an
older, genuine one, whose app has a hole that was fixed since. The file is per node: a node that has seen
nothing can be shown old things (docs/security.md).
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from relume.errors import Untrusted
from relume.store.names import CheckpointName


class Seen:
    """Kept in one small JSON file, replaced whole. One process of a node uses it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self._newest = {str(key): int(value) for key, value in found.items()}
        except FileNotFoundError:
            self._newest = {}
        except (ValueError, AttributeError, TypeError) as error:
            raise Untrusted(
                f"{path} is damaged: {error}",
                hint="Remove it if you know why it is; old checkpoints are accepted once then.",
            ) from None

    def newest(self, build: str, platform: str) -> int:
        """The newest generation of it that was ever seen here; 0 for none. What this node makes is to be newer."""
        with self._lock:
            return self._newest.get(f"{build}/{platform}", 0)

    def accept(self, name: CheckpointName) -> None:
        """Remember `name`, or raise Untrusted if a newer generation was seen here before."""
        key = f"{name.build}/{name.platform}"
        with self._lock:
            newest = self._newest.get(key, 0)
            if name.generation < newest:
                raise Untrusted(
                    f"the store offers generation {name.generation} of {name.build}; this node has seen {newest}",
                    hint="Somebody took the newer one away other than by `relume checkpoints rm`.",
                )
            if name.generation > newest:
                self._newest[key] = name.generation
                beside = self._path.with_suffix(".new")
                with os.fdopen(
                    os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
                ) as file:
                    json.dump(self._newest, file)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._path)
