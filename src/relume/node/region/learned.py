"""Working sets: what a node's restores have learned goes to the region, what the region knows comes here.

The pager counts in bytes of pages files, the store in pages of streams; this is where the two meet.
"""

from __future__ import annotations

import logging
from pathlib import Path

from relume.checkpoint.shelf import Shelf
from relume.errors import RelumeError
from relume.images import PAGE_SIZE, Pagemap, pages_sizes, read_image, read_pagemap
from relume.node.region import folder
from relume.node.region.view import View
from relume.pager import working_set
from relume.pager.working_set import Piece, WorkingSet
from relume.store import Fetched, Manifest, PageRun, read_from_files

log = logging.getLogger(__name__)

_PUBLISH_AGAIN = 0.1
"""A working set is published again when it has changed by this share of its bytes."""


class Learned:
    """Blocks; any thread."""

    def __init__(self, view: View, shelf: Shelf) -> None:
        self._view = view
        self._shelf = shelf

    def news(self, checkpoint_id: str) -> None:
        """A restore of a checkpoint on the shelf has learned: publish that where it is news. Raises nothing."""
        directory = self._shelf.directory(checkpoint_id)
        name = folder.published(directory)
        if name is None:
            return
        try:
            self.publish(self._view.manifest(name), directory)
        except RelumeError as error:
            log.warning("the working set of %s is not published: %s", checkpoint_id, error.message)

    def publish(self, manifest: Manifest, directory: Path) -> None:
        """Publish what was learned of a checkpoint that is whole in ``directory``. Raises StoreError, OSError."""
        images = directory / "images"
        learned, _ = working_set.load(directory / "working-set", pages_sizes(images))
        if learned is None or not learned.pieces:
            return
        before = folder.read_mark(directory).get("working_set_bytes")
        if before is not None and abs(learned.total - before) <= _PUBLISH_AGAIN * max(before, 1):
            return
        runs = _runs(images, learned)
        number = self._view.region.publish_working_set(manifest, runs, read_from_files(images))
        folder.mark(directory, manifest.name, working_set_bytes=learned.total)
        log.info("working set %d of %s is published: %d bytes", number, manifest.name.id, learned.total)

    def lay(self, fetched: Fetched) -> None:
        """What the region learned, as the pager reads it; what this node learned since is kept."""
        file = fetched.directory / "working-set"
        if file.exists() or fetched.pages.working_set is None:
            return
        sizes = pages_sizes(fetched.images)
        pieces = tuple(
            Piece(number, run.first * PAGE_SIZE, run.pages * PAGE_SIZE)
            for run in fetched.pages.working_set
            if (number := _pages_id(run.stream)) in sizes
        )
        learned = WorkingSet(sizes, pieces)
        working_set.save(file, learned)
        folder.mark(fetched.directory, fetched.manifest.name, working_set_bytes=learned.total)


def _runs(images: Path, learned: WorkingSet) -> list[PageRun]:
    """What a start needs, in order and each page once: what CRIU reads itself, then what the app touched."""
    criu = [
        Piece(pagemap.pages_id, extent.offset, extent.length)
        for pagemap in _pagemaps(images)
        for extent in pagemap.extents
        if not extent.lazy
    ]
    return [
        PageRun(f"pages-{piece.pages_id}.img", piece.offset // PAGE_SIZE, piece.length // PAGE_SIZE)
        for piece in working_set.refine((), (), [*criu, *learned.pieces])
    ]


def _pagemaps(images: Path) -> list[Pagemap]:
    pids = [task.pid for task in read_image(images / "pstree.img")]
    return [read_pagemap(images, pid) for pid in pids if (images / f"pagemap-{pid}.img").exists()]


def _pages_id(stream: str) -> int:
    number = stream.removeprefix("pages-").removesuffix(".img")
    return int(number) if number.isdecimal() else -1
