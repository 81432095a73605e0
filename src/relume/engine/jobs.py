"""What the node asks of the engine, and what it gets: plain values that travel as JSON to the keeper.

Paths are absolute host paths. Times are seconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from relume.linux.affinity import Affinity


@dataclasses.dataclass(frozen=True, slots=True)
class Container:
    """Where the things of one container are, and the runc that owns it."""

    instance_id: str
    runtime: str
    """Its directory under /run/relume: ``bundle/config.json``, ``rootfs``, ``images``, FIFOs, ``criu.conf``."""
    runc: str
    runc_root: str
    criu: str
    cgroup: str
    outgoing: bool
    """Whether pasta gives it a way out; else it has loopback only."""


@dataclasses.dataclass(frozen=True, slots=True)
class RestoreJob:
    """``images`` is where CRIU reads (readable by the mapped root), ``work`` where it writes its log.

    ``pager`` is the pager's job (see relume.pager), or None to restore eagerly.
    """

    images: str
    work: str
    options: str
    pager: dict[str, Any] | None = None
    needs_network: bool = False
    """Whether the way out must be there before the sockets are restored."""
    stopped: bool = False
    """Leave it stopped before its first instruction."""
    affinity: Affinity = dataclasses.field(default_factory=list)
    """Threads that were kept from some processors, and will be again."""


@dataclasses.dataclass(frozen=True, slots=True)
class DumpJob:
    """``images``, ``work`` and ``held`` are fresh directories; ``held`` gets the files that must come along.

    ``upper`` is the instance's writable layer, ``id_base`` the host id of root inside, ``everything`` copies
    all of the layer. ``timeout`` bounds the dump: past it the container is thawed whatever CRIU says.
    """

    dump_id: str
    images: str
    work: str
    held: str
    upper: str
    id_base: int
    options: str
    held_limit: int
    everything: bool
    timeout: float
    also: tuple[str, ...] = ()
    """Paths inside of files to be copied though nobody holds them."""


@dataclasses.dataclass(frozen=True, slots=True)
class DumpResult:
    """What came of a dump. ``error`` is empty when it worked; then ``held`` is a HeldReport as a dict.

    ``culprits`` is set when held files made it impossible. ``seconds`` is the whole command,
    ``copy_seconds`` the copying of held files while frozen.
    """

    dump_id: str
    error: str = ""
    no_space: bool = False
    """A file could not be copied for want of disk."""
    seconds: float = 0.0
    copy_seconds: float = 0.0
    held: dict[str, Any] = dataclasses.field(default_factory=dict)
    culprits: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    affinity: Affinity = dataclasses.field(default_factory=list)
    """Threads that are kept from some processors."""
    app_gone: bool = False
    killed: str = ""
    """The process that was killed while it was frozen, when others of the app live on."""
