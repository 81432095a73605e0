"""From a document to a validated model: the part that cerebrium.toml and node.toml share.

Every problem of a file is reported at once, each with file, line, key, value and what is allowed.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from relume.config.document import Document
from relume.config.keys import Table, allowed, key_of, leaves, table_of
from relume.config.lenient import Remarks, with_known_types, without_unknown
from relume.config.warning import ConfigWarning, dotted, shown
from relume.errors import ConfigError

T = TypeVar("T", bound=Table)
_MAX_PROBLEMS = 20


def model_of(model: type[T], data: dict[str, Any], remarks: Remarks, *, strict: bool) -> T:
    """Validate ``data`` (the document's, with spellings mended by the caller).

    Raises ConfigError with all problems; with ``strict`` unknown keys are among them.
    """
    data = without_unknown(data, model, remarks, strict=strict)
    data = with_known_types(data, model, remarks)
    document = remarks.document
    problems = [_from_warning(w) for w in remarks.found if strict and w.kind == "unknown"]
    try:
        result = model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems = [_problem(remarks, model, detail) for detail in details[:_MAX_PROBLEMS]] + problems
        raise _config_error(document, problems) from None
    if problems:
        raise _config_error(document, problems)
    return result


def _config_error(document: Document, problems: list[dict[str, Any]]) -> ConfigError:
    first = problems[0]
    return ConfigError(
        "\n".join(str(problem["message"]) for problem in problems),
        hint=f"allowed: {first['allowed']}" if first["allowed"] else "",
        file=str(document.path),
        **{name: first[name] for name in ("line", "key", "value", "allowed")},
        problems=problems,
    )


def _from_warning(warning: ConfigWarning) -> dict[str, Any]:
    return {
        "message": str(warning),
        "line": warning.line,
        "key": warning.key,
        "value": warning.value,
        "allowed": warning.allowed,
    }


def _problem(remarks: Remarks, model: type[Table], detail: ErrorDetails) -> dict[str, Any]:
    context = detail.get("ctx", {})
    path = tuple(str(part) for part in detail["loc"] if not isinstance(part, int))
    range_ = _allowed_at(model, path)
    if detail["type"] == "relume":
        path += (context["key"],) if context["key"] else ()
        range_ = context["allowed"] or _allowed_at(model, path) or range_
        what = context["message"]
    elif detail["type"] == "missing":
        what = "is missing"
    else:
        what = f"must be {range_}" if range_ else detail["msg"]
    document = remarks.document
    line = remarks.line(path)
    value = _at(document.data, path)
    place = f"{document.path}:{line}" if line else str(document.path)
    written = f" = {shown(value)}" if value is not None else ""
    return {
        "message": f"{place}: {dotted(path)}{written}: {what}",
        "line": line,
        "key": dotted(path),
        "value": shown(value) if value is not None else "",
        "allowed": range_,
    }


def _at(data: Any, path: tuple[str, ...]) -> Any:
    """The value as the user wrote it."""
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return None
        data = data[part]
    return data


def _allowed_at(model: type[Table], path: tuple[str, ...]) -> str:
    """What is allowed for a key; for one below a leaf (a package), what its leaf says."""
    text = ""
    current: type[Table] | None = model
    for part in path:
        if current is None:
            break
        field = current.model_fields.get(part)
        if field is None:
            current = current.SUBTABLES
            text = "a table"
            continue
        text = allowed(field)
        current = table_of(field)
    return text


def value_at(model: Table, path: tuple[str, ...]) -> Any:
    """A validated value, by its path; None below a table that is not there."""
    value: Any = model
    for part in path:
        value = getattr(value, part, None)
    return value


def written_keys(data: dict[str, Any], model: type[Table]) -> dict[tuple[str, ...], Any]:
    """The known keys that the file itself has, with their values."""
    found: dict[tuple[str, ...], Any] = {}
    for path, _ in leaves(model):
        if (value := _at(data, path)) is not None:
            found[path] = value
    return found


def notice_what_is_not_acted_on(file: Table, data: dict[str, Any], remarks: Remarks) -> None:
    """A remark for each key that is written and has no effect, unless its value is what happens anyway."""
    written = written_keys(data, type(file))
    for path, field in leaves(type(file)):
        key = key_of(field)
        if path in written and key.support == "accepted" and value_at(file, path) not in key.matches:
            remarks.add("not_acted", path, f"not acted on: {key.note}", value=written[path])
