"""Secrets of an app: environment variables that are in no build, log or manifest. One 0600 file per app."""

from __future__ import annotations

import json
import os
from pathlib import Path

from relume.errors import BadRequest


class Secrets:
    """The secrets of one app."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> dict[str, str]:
        """Names and values; empty where there are none."""
        try:
            content: dict[str, str] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        return content

    def set(self, new: dict[str, str]) -> None:
        """Add or replace. Raises BadRequest for a name that no environment can hold."""
        for name, value in new.items():
            if not name or "=" in name or "\0" in name + value:
                raise BadRequest(
                    f"{name!r} cannot be the name of an environment variable", hint="use NAME=VALUE"
                )
        self._write(self.all() | new)

    def remove(self, name: str) -> bool:
        """Whether it was there."""
        content = self.all()
        if content.pop(name, None) is None:
            return False
        self._write(content)
        return True

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)  # of a writing that a full disk or a kill has cut short

    @property
    def _temporary(self) -> Path:
        return self._path.with_suffix(".tmp")

    def _write(self, content: dict[str, str]) -> None:
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        self._temporary.rename(self._path)
