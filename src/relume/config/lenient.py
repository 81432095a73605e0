"""Spellings that are not the documented ones but can only mean one thing: understood, with a warning.

Three passes over the parsed data, each returning a new one: misspelt tables moved, unknown keys taken out,
values of another type read as the one that the key has. What cannot be mended is left to be refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from relume.config.document import Document, Spelled
from relume.config.keys import Table, allowed, leaves, plain_type, table_of
from relume.config.warning import ConfigWarning, Kind, dotted, shown

Path = tuple[str, ...]
_MAX_UNKNOWN = 50
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?")


class Remarks:
    """Collects warnings about one document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.found: list[ConfigWarning] = []
        self.moved: dict[Path, Path] = {}

    def line(self, path: Path) -> int | None:
        """Where a key was written, under the name that its table had in the file."""
        for target, written in self.moved.items():
            if path[: len(target)] == target:
                path = written + path[len(target) :]
        return self.document.line(path)

    def sorted(self) -> tuple[ConfigWarning, ...]:
        """In the file's order."""
        return tuple(sorted(self.found, key=lambda warning: warning.line or 0))

    def add(self, kind: Kind, path: Path, message: str, *, value: object = "", allowed: str = "") -> None:
        text = "" if value == "" else shown(value)
        line = self.line(path)
        self.found.append(
            ConfigWarning(kind, str(self.document.path), line, dotted(path), text, allowed, message)
        )


def without_unknown(
    data: Mapping[str, Any], model: type[Table], remarks: Remarks, *, strict: bool
) -> dict[str, Any]:
    """The data without keys that the models don't have; each gets a warning with what was probably meant.

    ``strict``: the caller refuses them, so the words must not say that they are ignored.
    """
    homes: dict[str, list[Path]] = {}
    for path, _ in leaves(model):
        homes.setdefault(path[-1], []).append(path[:-1])
    return _known(data, model, (), remarks, homes, "" if strict else ", ignored")


def _known(
    data: Mapping[str, Any],
    model: type[Table],
    path: Path,
    remarks: Remarks,
    homes: dict[str, list[Path]],
    verdict: str,
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    unknown = 0
    for name, value in data.items():
        field = model.model_fields.get(name)
        if field:
            inner = table_of(field)
            kept[name] = (
                _known(value, inner, (*path, name), remarks, homes, verdict)
                if inner and isinstance(value, dict)
                else value
            )
            continue
        near = difflib.get_close_matches(name[:80], list(model.model_fields), n=1, cutoff=0.6)
        extra = model.SUBTABLES
        if extra and isinstance(value, dict) and not near:
            kept[name] = _known(value, extra, (*path, name), remarks, homes, verdict)
            continue
        unknown += 1
        if unknown <= _MAX_UNKNOWN:
            message = f"unknown key{verdict}{_meant(name, near, homes)}"
            remarks.add("unknown", (*path, name), message, value=value, allowed=_one_of(model))
    if unknown > _MAX_UNKNOWN:
        remarks.add("unknown", path, f"{unknown - _MAX_UNKNOWN} more unknown keys{verdict}")
    return kept


def _one_of(model: type[Table]) -> str:
    return "one of " + ", ".join(model.model_fields)


def _meant(name: str, near: list[str], homes: dict[str, list[Path]]) -> str:
    if near:
        return f"; did you mean {near[0]}?"
    if name in homes:
        return f"; it belongs in [{dotted(homes[name][0])}]"
    close = difflib.get_close_matches(name[:80], list(homes), n=1, cutoff=0.8)
    return f"; did you mean {close[0]} in [{dotted(homes[close[0]][0])}]?" if close else ""


def with_known_types(data: dict[str, Any], model: type[Table], remarks: Remarks) -> dict[str, Any]:
    """Numbers and switches in quotes, versions without, one text where a list is due."""
    return dict(_mended(data, model, (), remarks))


def _mended(
    data: Mapping[str, Any], model: type[Table], path: Path, remarks: Remarks
) -> Iterator[tuple[str, Any]]:
    extra = model.SUBTABLES
    for name, value in data.items():
        here = (*path, name)
        field = model.model_fields.get(name)
        inner = table_of(field) if field else extra
        if inner:
            yield name, dict(_mended(value, inner, here, remarks)) if isinstance(value, dict) else value
        elif field and get_origin(plain_type(field)) is dict:
            yield name, _mended_versions(value, here, remarks)
        elif field:
            yield name, _mended_leaf(value, field, here, remarks)
        else:
            yield name, value


def _mended_versions(value: Any, path: Path, remarks: Remarks) -> Any:
    if not isinstance(value, dict):
        return value
    mended = {}
    for name, version in value.items():
        if type(version) is int or (isinstance(version, Spelled) and _NUMBER.fullmatch(version.text)):
            text = version.text if isinstance(version, Spelled) else str(version)
            remarks.add("spelling", (*path, name), f'a version is text: "{text}"', value=version)
            version = text
        mended[name] = version
    return mended


def _mended_leaf(value: Any, field: FieldInfo, path: Path, remarks: Remarks) -> Any:
    kind = plain_type(field)
    readers: tuple[Callable[[Any, Any], Any], ...] = (_number, _switch, _version)
    if get_origin(kind) is tuple and not any(isinstance(item, BeforeValidator) for item in field.metadata):
        # entrypoint and compute take one text by themselves
        readers = (_patterns if path[-1] in ("include", "exclude") else _one_as_list,)
    for read in readers:
        if (mended := read(value, kind)) is not None:
            remarks.add("spelling", path, f"read as {shown(mended)}", value=value, allowed=allowed(field))
            return mended
    return value


def _number(value: Any, kind: Any) -> int | float | None:
    if kind not in (int, float):
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        number = float(value)
        return int(number) if number.is_integer() else number
    if kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return None


def _switch(value: Any, kind: Any) -> bool | None:
    return (
        {"true": True, "false": False}.get(value.lower()) if kind is bool and isinstance(value, str) else None
    )


def _version(value: Any, kind: Any) -> str | None:
    """A float whose written form is one of the choices: ``python_version = 3.10``."""
    if isinstance(value, Spelled) and value.text in get_args(kind):
        return value.text
    return None


def _patterns(value: Any, kind: Any) -> list[str] | None:
    """``include = "[./*, main.py]"``, as the vendor's CLI wrote it in 2024, is the list that it looks like.

    Patterns only: a command may begin and end like that and be one (``[ -f a ] || [ -f b ]``).
    """
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return _one_as_list(value, kind)
    parts = (part.strip().strip("\"'").strip() for part in value[1:-1].split(","))
    return [part for part in parts if part]


def _one_as_list(value: Any, kind: Any) -> list[str] | None:
    return [value] if isinstance(value, str) else None


def misspelt_tables(data: dict[str, Any], remarks: Remarks) -> dict[str, Any]:
    """``[cerebrium.pip.dependancies]``, which public apps carry, is ``[cerebrium.dependencies.pip]``."""
    table = data.get("cerebrium")
    if not isinstance(table, dict):
        return data
    table = dict(table)
    for tool in ("pip", "apt", "conda"):
        written = table.get(tool)
        if not isinstance(written, dict):
            continue
        for spelling in ("dependancies", "dependencies"):
            packages = written.get(spelling)
            target = table.get("dependencies", {})
            if isinstance(packages, dict) and isinstance(target, dict) and tool not in target:
                table["dependencies"] = {**target, tool: packages}
                table.pop(tool, None)
                path = ("cerebrium", tool, spelling)
                remarks.moved["cerebrium", "dependencies", tool] = path
                remarks.add("spelling", path, f"read as [cerebrium.dependencies.{tool}]", value=packages)
    return {**data, "cerebrium": table}
