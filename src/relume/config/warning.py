"""What a file says that is worth a word to its author but stops nothing.

Kinds, for programs that filter:

``unknown``    a key nobody knows; ``relume check --strict`` makes it an error
``spelling``   a key or value written in another way than documented, and understood all the same
``value``      allowed, but hardly what the author wants
``not_acted``  documented and valid, but relume does nothing with it (yet)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["unknown", "spelling", "value", "not_acted"]


@dataclass(frozen=True, slots=True)
class ConfigWarning:
    """One remark. ``line`` counts from 1 and is None where it could not be found."""

    kind: Kind
    file: str
    line: int | None
    key: str
    value: str
    allowed: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def shown(value: object, limit: int = 80) -> str:
    """A value as it may appear in a terminal: no control characters, bounded in length."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if len(value) > 16 else f"[{', '.join(map(shown, value))}]"[:200]
    if isinstance(value, int) and value.bit_length() > 256:
        return "a very large number"
    text = str(value) if isinstance(value, (int, float)) else ascii_safe(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def ascii_safe(value: object) -> str:
    """``repr`` with double quotes for text, as TOML writes it; repr escapes what is not printable."""
    if isinstance(value, str):
        inner = repr(value[:500])[1:-1].replace('"', '\\"').replace("\\'", "'")
        return f'"{inner}"'
    return repr(value)[:500]


def dotted(path: tuple[str, ...]) -> str:
    """A key's path as TOML writes it: parts quoted where they are not bare keys."""
    return ".".join(part if _bare(part) else shown(part) for part in path)


def _bare(part: str) -> bool:
    return (
        part.isascii()
        and bool(part)
        and len(part) <= 80
        and part.replace("-", "_").replace("_", "a").isalnum()
    )
