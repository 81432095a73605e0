"""docs/format.md against the code: the numbers and names that both have."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from relume.store import bundle, chunks, envelope, gc, manifest, working_set
from relume.store.builds import BuildRecord
from relume.store.envelope import LIMITS, Kind
from relume.store.keys import Epoch
from relume.store.manifest import Manifest, Sizes
from relume.store.names import CheckpointName
from relume.store.working_set import WorkingSetList

PAGE = (Path(__file__).parents[3] / "docs/format.md").read_text()


def test_kinds() -> None:
    rows = re.findall(r"^\| `([a-z-]+)/[^`]*` \| (\d)", PAGE, re.MULTILINE)
    first_words = {
        Kind.CHUNK: "chunk",
        Kind.INDEX: "checkpoint",
        Kind.IMAGES: "checkpoint",
        Kind.MANIFEST: "checkpoint",
        Kind.WORKING_SET_PART: "working-set",
        Kind.WORKING_SET_LIST: "working-set",
        Kind.LAYER: "layer",
        Kind.BUILD: "build",
    }
    assert {Kind(int(number)): name for name, number in rows} == first_words


def test_names() -> None:
    name = CheckpointName("BUILD", "PLATFORM", 1)
    for path in (name.index, name.images, name.manifest, name.removed):
        assert f"`{path.replace('/1/', '/G/')}`" in PAGE
    assert f"`{name.working_sets.replace('/1', '/G')}/W/list`" in PAGE


def test_numbers() -> None:
    assert f"A *page* is {chunks.PAGE} bytes" in PAGE
    assert f"never before {chunks.MIN_PAGES} pages" in PAGE
    assert f"always at {chunks.MAX_PAGES} (" in PAGE
    assert f"0 modulo {chunks._MEAN} " in PAGE
    assert f"at most {working_set.PART_PAGES} together" in PAGE
    mib = 1 << 20
    limits = (
        f"chunk {LIMITS[Kind.CHUNK] // mib} MiB, index {LIMITS[Kind.INDEX] // mib} MiB, "
        f"images {LIMITS[Kind.IMAGES] // mib} MiB, manifest and the other"
    )
    assert limits in PAGE
    signed = {LIMITS[kind] for kind in (Kind.MANIFEST, Kind.WORKING_SET_LIST, Kind.LAYER, Kind.BUILD)}
    assert signed == {64 * mib}
    assert LIMITS[Kind.CHUNK] == chunks.MAX_PAGES * chunks.PAGE
    assert LIMITS[Kind.WORKING_SET_PART] >= working_set.PART_PAGES * chunks.PAGE
    assert f"version `u8` = {envelope.FORMAT}" in PAGE
    assert gc._CLOSED.decode().strip() in PAGE


def test_keys_and_headers() -> None:
    used = set(re.findall(r'derive\(f?"([a-z]+)', inspect.getsource(chunks) + inspect.getsource(Epoch)))
    used |= {"wrap"}
    assert set(re.findall(r"\| `relume 1 ([a-z]+) ?`", PAGE)) == used
    for header in (bundle._KIND, bundle._XATTR, *(f"{prefix}*" for prefix in bundle._KEPT_XATTRS)):
        assert header in PAGE


def test_fields() -> None:
    for model, title in (
        (Manifest, "## Manifest"),
        (WorkingSetList, "## Working set"),
        (BuildRecord, "## Builds"),
    ):
        section = PAGE.partition(title)[2].partition("\n## ")[0]
        for field in model.model_fields:
            assert f"`{field}`" in section, f"{title}: {field}"
    for field in (*Sizes.model_fields, *manifest.ObjectRef.model_fields):
        assert field in PAGE
