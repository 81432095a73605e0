"""What relume does with a key, written beside the key's type in the models.

The models are the one table: validation, ``relume check``'s notices and docs/compatibility.md all read it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

Support = Literal["acted on", "accepted", "refused"]
"""``accepted``: read, checked and reported, no effect. ``refused``: ``deploy`` says no."""


@dataclass(frozen=True, slots=True)
class Key:
    """``note``: what relume does with it, for the table and the notice. ``matches``: values of an *accepted*
    key that already describe what relume does, so that nothing needs to be said. ``allowed``: the range in
    words, where the type and its limits don't say it."""

    note: str
    support: Support = "acted on"
    allowed: str = ""
    matches: tuple[object, ...] = ()


class Table(BaseModel):
    """Base of all models: immutable, exact types (config/lenient.py mends spellings before)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    SUBTABLES: ClassVar[type[Table] | None] = None
    """The model of further sub-tables, for the one table whose names cannot all be listed (runtime)."""


def key_of(field: FieldInfo) -> Key:
    """The field's Key. Every field has one; a test holds that."""
    return next(item for item in field.metadata if isinstance(item, Key))


def plain_type(field: FieldInfo) -> Any:
    """The field's type without ``| None`` and ``Annotated``."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return kind


def table_of(field: FieldInfo) -> type[Table] | None:
    """The model of a field that is a table of known keys; None for a leaf."""
    kind = plain_type(field)
    return kind if isinstance(kind, type) and issubclass(kind, Table) else None


def leaves(model: type[Table], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key below a model, with its path."""
    for name, field in model.model_fields.items():
        if inner := table_of(field):
            yield from leaves(inner, (*path, name))
        else:
            yield (*path, name), field


def allowed(field: FieldInfo) -> str:
    """The values a field takes, in words."""
    if text := key_of(field).allowed:
        return text
    kind = plain_type(field)
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return _number(field, "a whole number" if kind is int else "a number")
    if origin is tuple:
        return "a list of texts"
    if kind is dict or origin in (dict, Mapping):
        return "a table"
    return "a table" if table_of(field) else "text"


def _number(field: FieldInfo, noun: str) -> str:
    low = high = ""
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f"{limit.ge}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {limit.gt}"
        elif isinstance(limit, annotated_types.Le):
            high = f"{limit.le}"
    if low and high:
        return f"{noun} from {low} to {high}" if "above" not in low else f"{noun} {low}, at most {high}"
    if low:
        return f"{noun} of {low} or more" if "above" not in low else f"{noun} {low}"
    return noun
