"""How a copy begins, top to bottom: what a restore needs in place before runc and CRIU run.

    check the small images -> lay held files -> (mount, bundle, keeper: the node's part, as at boot) -> the job

Guarantees: nothing of a damaged checkpoint is handed to CRIU; the layer a copy gets is its own and fresh.
The node starts the job, judges it by the app's readiness, and cleans up and boots cold when it fails.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.engine import held, options
from relume.engine.jobs import RestoreJob
from relume.images import integrity

FIRST_LINE = "CEREBRIUM_RESTORED: container restored from checkpoint"
"""The first line of a copy's log, to the letter of the documented interface."""

_ROOM = 1.15


def why_eager(checkpoint: Checkpoint, memory_limit: int | None) -> str:
    """Why the memory must be read at once rather than on demand; empty when it need not.

    Pages that forked processes share are shared again by an eager restore only: CRIU compares them when
    it writes them, and cannot when it does not. So a preforked app may need much more memory lazily.
    """
    need = round(checkpoint.lazy_bytes * _ROOM)
    if memory_limit is not None and need > memory_limit:
        return f"paged in, its processes need {need} bytes and the limit is {memory_limit}"
    return ""


@dataclasses.dataclass(frozen=True, slots=True)
class Restoration:
    """A checkpoint about to become a copy whose root is ``id_base`` on the host.

    ``verified`` is where it is remembered which blocks of the image were checked in this boot; None reads all.
    ``fetched`` is where it lies if that is not the shelf: in the region's cache, its pages perhaps not all there.
    """

    shelf: Shelf
    checkpoint: Checkpoint
    id_base: int
    verified: Path | None
    fetched: Path | None = None

    @property
    def images(self) -> Path:
        """CRIU's images, shared by all copies."""
        return self._stored / "images"

    @property
    def _stored(self) -> Path:
        return self.fetched or self.shelf.directory(self.checkpoint.checkpoint_id)

    @property
    def lower_layer(self) -> Path | None:
        """The saved writable layer, where all of it was saved; it becomes the copy's topmost lower layer."""
        return self._stored / "held" if self.checkpoint.filesystem == "all" else None

    def verify(self, *, pages: bool) -> None:
        """Check the images against their hashes: the small ones, and the pages too unless the pager will.

        Raises Untrusted or ImageError, which means: this checkpoint is damaged.
        """
        verifier = integrity.Verifier(self.images, self.verified)
        verifier.check_small()
        if not pages:
            return
        for path in sorted(self.images.glob("pages-*.img")):
            if path.stat().st_size == 0:
                continue
            checker = verifier.pages(path)
            try:
                checker.check_all()
            finally:
                checker.close()

    def lay_files(self, upper: Path) -> None:
        """Put the held files into ``upper``, before the overlay is mounted on it; above a saved layer only those
        that must be there."""
        only = None if self.lower_layer is None else self.checkpoint.own_files
        held.lay(self._stored / "held", upper, id_base=self.id_base, only=only)

    def pager_job(
        self, *, work: Path, cgroup: str, fill: str, root: Path, learn: bool = True
    ) -> dict[str, Any]:
        """The pager's job (relume.pager.job). Without ``learn`` it neither replays nor records."""
        learned = str(self._stored / "working-set") if learn else None
        return {
            "images": str(self.images),
            "work_dir": str(work),
            "working_set": learned,
            "record": learned,
            "fill": fill,
            "cgroup": cgroup,
            "verify": str(self.verified) if self.verified else None,
            **self._whole_processes(),
            "root": str(root),
        }

    def _whole_processes(self) -> dict[str, Any]:
        """Processes whose device memory was put away must lack nothing when the driver gives it back, for it pins
        pages (relume.pager.whole)."""
        pids = [process["inside"] for process in self.checkpoint.gpu.get("processes", ())]
        return {"whole": pids, "threads": max(2, min(8, (os.cpu_count() or 2) // 2))} if pids else {}

    def job(
        self, *, images: Path, work: Path, cgroup: str, pager: dict[str, Any] | None, stopped: bool = False
    ) -> RestoreJob:
        """The engine's job; ``images`` is where the mapped root can read them, ``cgroup`` the copy's."""
        return RestoreJob(
            images=str(images),
            work=str(work),
            options=options.for_restore(
                loopback=self.checkpoint.loopback, work=work, cgroup=cgroup, leave_stopped=stopped
            ),
            pager=pager,
            needs_network=self.checkpoint.needs_network,
            stopped=stopped,
            affinity=self.checkpoint.affinity,
        )
