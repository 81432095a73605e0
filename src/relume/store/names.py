"""Where objects lie. The one place that makes and checks names, so that nothing foreign becomes a path."""

from __future__ import annotations

import re
from dataclasses import dataclass

from relume.errors import BadRequest

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def word(text: str, what: str) -> str:
    """`text`, if it may be a part of a name. Raises BadRequest."""
    if not _WORD.fullmatch(text) or ".." in text:
        raise BadRequest(
            f"{what} {text[:140]!r} is not a plain name", hint="Letters, digits, '.', '_', '-'; at most 128."
        )
    return text


@dataclass(frozen=True, slots=True, order=True)
class CheckpointName:
    """One checkpoint in the store: `generation` is the number of the lease it was made under."""

    build: str
    platform: str
    generation: int

    def __post_init__(self) -> None:
        word(self.build, "build")
        word(self.platform, "platform")
        if self.generation < 1:
            raise BadRequest(f"generation {self.generation} is not 1 or more")

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """The checkpoint that an object below `checkpoint/` belongs to; None for anything else."""
        parts = name.split("/")
        if len(parts) != 5 or parts[0] != "checkpoint" or not re.fullmatch(r"[1-9][0-9]{0,17}", parts[3]):
            return None
        try:
            return cls(parts[1], parts[2], int(parts[3]))
        except BadRequest:
            return None

    @classmethod
    def from_id(cls, text: str) -> CheckpointName:
        """The inverse of `id`. Raises BadRequest."""
        build, _, rest = text.partition(".")
        platform, _, generation = rest.rpartition(".")
        if not generation.isdecimal():
            raise BadRequest(f"{text[:140]!r} is no checkpoint's id")
        return cls(build, platform, int(generation))

    @property
    def id(self) -> str:
        """The checkpoint's id for people: unlike for every checkpoint of a store."""
        return f"{self.build}.{self.platform}.{self.generation}"

    def _path(self, last: str) -> str:
        return f"checkpoint/{self.build}/{self.platform}/{self.generation}/{last}"

    @property
    def manifest(self) -> str:
        return self._path("manifest")

    @property
    def index(self) -> str:
        return self._path("index")

    @property
    def images(self) -> str:
        return self._path("images")

    @property
    def removed(self) -> str:
        return self._path("removed")

    @property
    def working_sets(self) -> str:
        return f"working-set/{self.build}/{self.platform}/{self.generation}"

    @property
    def lease(self) -> str:
        return lease(self.build, self.platform)


def lease(build: str, platform: str) -> str:
    return f"lease/{word(build, 'build')}/{word(platform, 'platform')}"
