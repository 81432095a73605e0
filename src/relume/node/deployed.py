"""What a deploy came to."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from relume.build import Build

How = Literal["built", "reused", "adopted"]


@dataclasses.dataclass(frozen=True, slots=True)
class Deployed:
    """``how`` the build came here: made now, made here before, or made by another node of the region.

    ``in_region`` says whether other nodes can adopt it, None on a node without a region; where they cannot, or
    where the region's was not used, ``reason`` says why.
    """

    build: Build
    how: How
    in_region: bool | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "app": self.build.app,
            "build_id": self.build.build_id,
            "how": self.how,
            "in_region": self.in_region,
            "reason": self.reason,
        }
