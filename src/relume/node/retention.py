"""Which checkpoints have had their time: by count and by age, for each app and kind of machine.

``[store] keep_checkpoints`` and ``keep_days``. Ages are by the clocks of the nodes that made them, so they are as
right as those: days, not minutes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

DAY_S = 86400.0


def outlived(
    rows: Iterable[Mapping[str, Any]], *, keep: int | None, keep_days: float | None, now: float
) -> dict[str, str]:
    """Checkpoint id -> why it goes, from rows of ``checkpoints ls``. One in the making or unreadable never does."""
    found: dict[str, str] = {}
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["app"] is not None and row["created_at"] is not None and row["state"] != "creating":
            kinds[row["app"], row["platform"]].append(row)
    for (app, _), own in kinds.items():
        own.sort(key=lambda row: row["created_at"], reverse=True)
        for place, row in enumerate(own):
            age = (now - row["created_at"]) / DAY_S
            if keep is not None and place >= keep:
                found[row["checkpoint_id"]] = f"{app} has {keep} newer ones"
            elif keep_days is not None and age > keep_days:
                found[row["checkpoint_id"]] = f"it is {age:.1f} days old"
    return found
