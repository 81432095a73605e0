#!/usr/bin/env python3
"""Writes the measured tables into README.md and the pages of docs/: `bench/render.py [--check]`.

The rows are those of `bench/results/*.json`, as `relume bench --json` printed them; no figure is typed by hand.
A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`. `--check` writes nothing and exits 1 where a
page is not what it would be.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from relume.cli.benchmark import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("bench.md", "gpu.md", "region.md", "vllm.md")),
)

_BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def rows(pattern: str) -> list[dict[str, Any]]:
    """The rows of the files whose names match."""
    return [row for path in sorted(RESULTS.glob(pattern)) for row in json.loads(path.read_text())]


def tables() -> dict[str, list[str]]:
    """Block name -> lines of Markdown."""
    measured = rows("ways.json")
    return {
        "warm": report.markdown(measured, cache="warm"),
        "dropped": report.markdown(measured, cache="dropped"),
        "clones": report.markdown_clones(rows("clones.json")),
        "held": report.markdown(rows("held.json"), cache="warm"),
        "vllm": report.markdown(rows("vllm.json"), cache="warm"),
        "vllm-parts": _parts(rows("vllm.json")),
        "gpu": report.markdown(rows("gpu.json"), cache="warm"),
        "gpu-parts": _parts(rows("gpu.json")),
        "region": report.markdown_region(rows("region.json")),
        "freeze": report.markdown_freeze(measured),
        "stages": report.markdown_stages(measured),
        "chart": ["```", *report.chart([row for row in measured if _charted(row)])[1:], "```"],
    }


def _parts(measured: list[dict[str, Any]]) -> list[str]:
    """What the first answers of one workload consist of, as a list."""
    if not measured:
        return []
    one, freeze = measured[0], measured[0]["freeze"]
    ready = ", ".join(f"`{row['way']}` {report.time(row['stages']['ready'])}" for row in measured)
    return [
        f"- ready: {ready}",
        f"- the same answer from the warm original: {report.time(one['answer_s'])}",
        f"- its checkpoint: {report.mega(one['image_bytes'])}; it stood still for {report.time(freeze['frozen_s'])}, "
        f"of which {report.time(freeze['memwrite_s'])} went into writing pages",
    ]


def _charted(row: dict[str, Any]) -> bool:
    return row["workload"] == "model" and row["cache"] == "warm" and "clones" not in row


def rendered(page: str, blocks: dict[str, list[str]]) -> str:
    """The page with its blocks filled in. Raises KeyError for a name that is none."""
    return _BLOCK.sub(lambda found: "\n".join([found[1].rstrip(), *blocks[found[2]], found[3]]), page)


def main() -> int:
    blocks = tables()
    stale = 0
    for path in PAGES:
        before = path.read_text()
        after = rendered(before, blocks)
        if after == before:
            continue
        stale += 1
        if "--check" in sys.argv[1:]:
            print(f"{path}: its tables are not those of bench/results; run bench/render.py", file=sys.stderr)
        else:
            path.write_text(after)
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
