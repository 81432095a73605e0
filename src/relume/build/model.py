"""What a build is: the value that the node keeps, starts instances from and compares checkpoints by.

Frozen and plain: everything here survives a round trip through JSON. A ``Build`` says where its layers lie
on this node; its ``build_id`` does not depend on that place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A directory tree that is never written again.

    ``path`` is the tree: ownership counted from 0, deletions of lower layers' files as overlayfs writes them
    (0/0 character devices, ``trusted.overlay.opaque``). ``digest`` is 64 hex digits over the tree's content
    (see ``tree.digest``); it does not cover times.
    """

    digest: str
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Build:
    """An immutable version of an app. ``layers`` are ordered lowest first."""

    build_id: str
    app: str
    inputs_digest: str
    layers: tuple[Layer, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    user: str
    """``UID:GID`` inside, as numbers."""
    port: int
    checkpointing: bool
    config: Mapping[str, Any]
    """The app's configuration as it was last deployed (``AppConfig.model_dump(mode="json")``)."""
    base: str
    resolved: Mapping[str, Any]
    """What was installed: ``base``, ``python``, and versions by name under ``apt`` and ``pip``."""
    created_at: float
    """Seconds since the epoch."""

    def as_dict(self) -> dict[str, Any]:
        """JSON content of ``builds/BUILD_ID.json``; layers are digests, their place is the reader's."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {
            "layers": [layer.digest for layer in self.layers],
            "argv": list(self.argv),
            "env": dict(self.env),
            "config": dict(self.config),
            "resolved": dict(self.resolved),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], layers_directory: Path) -> Build:
        """The inverse of ``as_dict``. Raises KeyError or TypeError where ``data`` is not one."""
        known = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        return cls(
            **known
            | {
                "layers": tuple(Layer(digest, layers_directory / digest) for digest in data["layers"]),
                "argv": tuple(data["argv"]),
            }
        )
