"""What a function returned, as bytes for the client; and a clear reason when that cannot be."""

from __future__ import annotations

import json
import sys
from typing import Any

from ._errors import AppError


class NotJson(Exception):
    """The value cannot be JSON. The message says which part of it, and its type."""


def as_json(value: Any) -> bytes:
    """``value`` as JSON. pydantic models anywhere in it are dumped; NaN and infinities are refused, since
    JSON has none. Half a surrogate pair, which UTF-8 has no bytes for, is escaped. Raises NotJson, and
    AppError where a serializer of the app's raised."""
    try:
        text = json.dumps(
            value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_dump_model
        )
        return text.encode("utf-8", "backslashreplace")
    except (TypeError, ValueError, RecursionError) as error:
        raise NotJson(_culprit(value, "result") or str(error)) from error


def as_event(chunk: Any) -> bytes:
    """One chunk of a stream as a server-sent event (WHATWG HTML, 9.2). Raises NotJson.

    Text is sent as it is, a line of it per ``data:`` line; anything else as JSON. Text that already is an
    event (``data: ...`` with its blank line, as OpenAI-compatible apps write it) is not wrapped again.
    """
    if isinstance(chunk, bytes | bytearray):
        chunk = chunk.decode("utf-8", "replace")
    if not isinstance(chunk, str):
        return b"data: " + as_json(chunk) + b"\n\n"
    if chunk.startswith(("data:", "event:", "id:", ":")) and chunk.endswith("\n\n"):
        return chunk.encode("utf-8", "replace")
    lines = chunk.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return ("".join(f"data: {line}\n" for line in lines) + "\n").encode("utf-8", "replace")


def _dump_model(value: Any) -> Any:
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None or not isinstance(value, pydantic.BaseModel):
        raise TypeError(type(value).__name__)
    try:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else json.loads(value.json())
    except (TypeError, RecursionError):
        raise
    except BaseException as error:
        if type(error).__name__ != "PydanticSerializationError":
            raise AppError from error
        if error.__cause__ is None:  # pydantic's own: a field holds what JSON cannot
            raise
        raise AppError from error.__cause__


def _culprit(value: Any, where: str, depth: int = 0) -> str:
    """Where in ``value`` the first part is that JSON cannot hold; empty when none is found."""
    if depth > 100:
        return f"{where} refers to itself, or is nested too deep"
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str | int | float | bool | None):
                return f"{where} has a key of type {type(key).__name__}"
            if found := _culprit(part, f"{where}[{key!r}]", depth + 1):
                return found
        return ""
    if isinstance(value, list | tuple):
        for index, part in enumerate(value):
            if found := _culprit(part, f"{where}[{index}]", depth + 1):
                return found
        return ""
    try:
        json.dumps(value, allow_nan=False, default=_dump_model)
    except (TypeError, ValueError):
        if isinstance(value, float):
            return f"{where} is {value!r}, which JSON does not have"
        hint = "; use .tolist()" if hasattr(value, "tolist") else ""
        return f"{where} is of type {type(value).__module__}.{type(value).__qualname__}{hint}"
    return ""
