"""Rows for people: a bar chart per workload for a terminal, and tables in Markdown for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from relume.cli.benchmark.measure import own_share

Row = dict[str, Any]

_WIDTH = 40


def chart(rows: Sequence[Row], *, block: str = "█") -> list[str]:
    """Horizontal bars of the times to the first answer (of clones: to the last), one group a workload and cache."""
    lines: list[str] = []
    for (workload, cache), group in groupby(rows, key=lambda row: (row["workload"], row["cache"])):
        members = list(group)
        longest = max(_seconds(row) for row in members)
        lines += ["", f"{workload}, page cache {cache}"]
        for row in members:
            bar = block * max(1, round(_WIDTH * _seconds(row) / longest))
            lines.append(f"  {row['way']:<11} {bar} {time(_seconds(row))}")
    return lines


def table(rows: Sequence[Row]) -> list[Row]:
    """What a person compares, from full rows."""
    best = baseline(rows)
    shown = []
    for row in rows:
        low, high = row["spread"]
        line: Row = {
            "workload": row["workload"],
            "cache": row["cache"],
            "way": row["way"],
            "first_answer": time(row["first_answer_s"]),
            "spread": f"{time(low)} - {time(high)}",
            "against_eager": ratio(best.get((row["workload"], row["cache"])), _seconds(row)),
            "image_bytes": row["image_bytes"],
            "touched_bytes": row["touched_bytes"],
        }
        if "clones" in row:
            line |= {
                "clones": row["clones"],
                "last_answer": time(row["last_answer_s"]),
                "pss_bytes": row["pss_bytes"],
                "cgroup_bytes": row["cgroup_bytes"],
            }
        else:
            line["frozen"] = time(row["frozen_s"])
        shown.append(line)
    return shown


COLUMNS = (
    ("workload", "WORKLOAD"),
    ("cache", "CACHE"),
    ("way", "WAY"),
    ("clones", "CLONES"),
    ("first_answer", "FIRST ANSWER"),
    ("last_answer", "LAST ANSWER"),
    ("spread", "SPREAD"),
    ("against_eager", "EAGER / THIS"),
    ("image_bytes", "IMAGE"),
    ("touched_bytes", "TOUCHED"),
    ("frozen", "FROZEN"),
    ("pss_bytes", "PSS EACH"),
    ("cgroup_bytes", "CGROUP EACH"),
)


def region_table(rows: Sequence[Row]) -> list[Row]:
    """A line for each goal of `bench --region`."""
    return [
        {
            "row": row["row"],
            "workload": row["workload"],
            "seconds": time(row["seconds"]),
            "ratio": goal["ratio"],
            "got": row[goal["ratio"]],
            "goal": goal["goal"],
            "met": "yes" if goal["met"] else "no",
        }
        for row in rows
        for goal in row["goals"]
    ]


REGION_COLUMNS = (
    ("row", "ROW"),
    ("workload", "WORKLOAD"),
    ("seconds", "SECONDS"),
    ("ratio", "RATIO"),
    ("got", "GOT"),
    ("goal", "GOAL"),
    ("met", "MET"),
)


def baseline(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(workload, cache) -> seconds of the eager restore in the same run."""
    return {(row["workload"], row["cache"]): _seconds(row) for row in rows if row["way"] == "criu-eager"}


def ratio(reference: float | None, seconds: float) -> str:
    """How many times sooner than the reference: "4.8 x"."""
    return "-" if reference is None else f"{reference / seconds:.2g} x"


def time(seconds: float) -> str:
    """0.1842 -> "184 ms", 4.731 -> "4.73 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def markdown(rows: Sequence[Row], *, cache: str) -> list[str]:
    """A table of first answers: a line for each workload, a column for each way; ratios to the eager restore."""
    chosen = [row for row in rows if row["cache"] == cache and "clones" not in row]
    ways = list(dict.fromkeys(row["way"] for row in chosen))
    lines = [
        f"| workload | image | touched | {' | '.join(ways)} |",
        f"|---|--:|--:|{'--:|' * len(ways)}",
    ]
    best = baseline(chosen)
    for workload, group in groupby(chosen, key=lambda row: row["workload"]):
        found = {row["way"]: row for row in group}
        one = next(iter(found.values()))
        cells = [_markdown_cell(found.get(way), best.get((workload, cache))) for way in ways]
        lines.append(
            f"| `{workload}` | {mega(one['image_bytes'])} | {mega(one['touched_bytes'])} | {' | '.join(cells)} |"
        )
    return lines


def markdown_clones(rows: Sequence[Row]) -> list[str]:
    """A table of the clones' rows."""
    lines = [
        "| workload | way | clones | last first answer | touched | PSS each | cgroup each |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['workload']}` | {row['way']} | {row['clones']} | {time(row['last_answer_s'])} "
        f"| {mega(row['touched_bytes'])} | {mega(row['pss_bytes'])} | {mega(row['cgroup_bytes'])} |"
        for row in rows
        if "clones" in row
    ]
    return lines


def markdown_freeze(rows: Sequence[Row]) -> list[str]:
    """A table of what the freeze consists of, one line a workload; per GB from half a GB on.

    Beside it what a GB takes to be copied into the page cache, and to the disk, on the same machine.
    """
    lines = [
        "| workload | image | frozen | per GB | memory's limit, the disk's | writing pages | held files "
        "| after the thaw: edits, hashes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for workload, group in groupby((row for row in rows if "freeze" in row), key=lambda row: row["workload"]):
        row = next(iter(group))
        freeze, gigabytes = row["freeze"], row["image_bytes"] / 1e9
        # What a freeze costs whatever the size, some 0.1 s, would be most of it in a small one.
        per_gigabyte = f"{freeze['frozen_s'] / gigabytes:.2f} s" if gigabytes >= 0.5 else "-"
        limits = ", ".join(f"{1e9 / speed:.2f} s" for speed in row.get("freeze_limits", {}).values())
        after = f"{time(freeze['edit_s'])}, {time(freeze['hash_s'])}"
        lines.append(
            f"| `{workload}` | {mega(row['image_bytes'])} | {time(freeze['frozen_s'])} "
            f"| {per_gigabyte} | {limits} | {time(freeze['memwrite_s'])} "
            f"| {time(freeze['held_files_s'])} | {after} |"
        )
    return lines


def markdown_stages(rows: Sequence[Row]) -> list[str]:
    """A table of when each stage of a learned start was over, page cache warm; our own share at the end."""
    chosen = [row for row in rows if row["way"] == "learned" and row["cache"] == "warm" and "stages" in row]
    names = list(dict.fromkeys(name for row in chosen for name in row["stages"]))
    lines = [
        f"| workload | {' | '.join(f'`{name}`' for name in names)} | first answer | our own |",
        f"|---|{'--:|' * (len(names) + 2)}",
    ]
    for row in chosen:
        cells = [time(row["stages"][name]) if name in row["stages"] else "-" for name in names]
        own = own_share(row["stages"])
        cells += [time(row["first_answer_s"]), "-" if own is None else time(own)]
        lines.append(f"| `{row['workload']}` | {' | '.join(cells)} |")
    return lines


def markdown_region(rows: Sequence[Row]) -> list[str]:
    """A table of `bench --region`: what was measured, what it is beside, and the ratios with their goals."""
    lines = ["| what | seconds | beside | ratio | goal |", "|---|--:|---|--:|--:|"]
    lines += [
        f"| {_region_what(row)} | {time(row['seconds'])} | {_region_beside(row, goal['ratio'])} "
        f"| {row[goal['ratio']]:g} | {goal['goal']} |"
        for row in rows
        for goal in row["goals"]
    ]
    return lines


def _region_what(row: Row) -> str:
    match row["row"]:
        case "upload" | "download":
            return f"{row['row']} of `{row['workload']}`, {mega(row['plain_bytes'])}"
        case "crowd":
            return f"{row['nodes']} nodes start `{row['workload']}` at once"
        case _:
            return f"first answer of `{row['workload']}` on a strange node, {row['link']}"


def _region_beside(row: Row, ratio: str) -> str:
    match ratio:
        case "speed_ratio":
            return f"plain obstore, {row['plain_way']}: {time(row['plain_s'])}"
        case "to_local":
            return f"local `learned`, cache dropped: {time(row['local_dropped_s'])}"
        case "sooner_than_download":
            return f"downloaded, then restored eagerly: {time(row['download_eager_s'])}"
        case "bytes_ratio":
            read, needed = mega(row["store_bytes"]), mega(row["working_set_stored_bytes"])
            return f"read before it: {read}; the working set: {needed}"
        case _:
            return ratio.replace("_", " ")


def mega(count: int | None) -> str:
    """Bytes as "1612 MB"."""
    return "-" if count is None else f"{count / 1e6:.0f} MB"


def _markdown_cell(row: Row | None, reference: float | None) -> str:
    if row is None:
        return "-"
    seconds = row["first_answer_s"]
    beside = f" ({ratio(reference, seconds)})" if row["way"] != "criu-eager" and reference else ""
    return f"{time(seconds)}{beside}"


def _seconds(row: Row) -> float:
    return float(row["last_answer_s"] if "clones" in row else row["first_answer_s"])
