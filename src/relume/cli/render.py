"""All output of the command line.

Data goes to stdout, everything about it (progress, questions, errors) to stderr. Where stdout is a terminal, tables
and panels are drawn by rich, which is imported only then; where not, each line has a plain twin without colour,
box or cut. With ``-o json`` stdout holds one JSON document and nothing else, also for errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relume.errors import RelumeError

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, str]]
"""(field, heading) in the order they are shown; fields that no row has are left out."""


class Screen:
    """What a command prints to. One per command run."""

    def __init__(self, output: str = "table") -> None:
        self.as_json = output == "json"
        self.drawn = not self.as_json and sys.stdout.isatty()

    def step(self, text: str) -> None:
        """A step that begins, on stderr; indented text is what the step itself says."""
        _say(text if text.startswith(" ") else f"• {text}")

    def done(self, text: str) -> None:
        """A step that went well, on stderr; indented text is what the step itself says."""
        _say(text if text.startswith(" ") else f"✓ {text}")

    def note(self, text: str) -> None:
        """A remark that stops nothing, on stderr."""
        _say(f"! {text}")

    def hint(self, text: str) -> None:
        """What could be done next, on stderr; not for programs."""
        if not self.as_json:
            _say(f"  {text}")

    def warnings(self, warnings: Iterable[object]) -> None:
        """Remarks about a file; as JSON they are part of the result, if of anything."""
        for warning in () if self.as_json else warnings:
            self.note(str(warning))

    def removed(self, kind: str, name: str) -> None:
        """The result of a verb that has none but that it is done."""
        self.data({kind: name, "removed": True}, [f"✓ {name} is removed"])

    def data(self, value: Any, lines: Sequence[str] = ()) -> None:
        """The result: ``value`` as JSON, or its lines for people."""
        if self.as_json:
            _print(_json(value, indent=2 if sys.stdout.isatty() else None))
            return
        for line in lines:
            _print(line)

    def table(self, rows: Sequence[Row], columns: Columns, *, empty: str) -> None:
        """A listing. As JSON the rows go out whole, whatever the columns are."""
        if self.as_json:
            self.data(rows)
            return
        if not rows:
            _say(empty)
            return
        present = [(field, heading) for field, heading in columns if any(field in row for row in rows)]
        cells = [[_cell(field, row.get(field)) for field, _ in present] for row in rows]
        headings = [heading for _, heading in present]
        if self.drawn:
            _rich_table(headings, cells)
        else:
            _plain_table(headings, cells)

    def record(self, value: Mapping[str, Any]) -> None:
        """One thing with all its fields."""
        if self.as_json:
            self.data(value)
            return
        width = max((len(name) for name in value), default=0)
        for name, item in value.items():
            text = (
                _cell(name, item)
                if not isinstance(item, (dict, list))
                else json.dumps(item, ensure_ascii=False)
            )
            _print(f"{name:<{width}}  {text}")

    def panel(self, title: str, groups: Mapping[str, Mapping[str, str]]) -> None:
        """Named groups of settings, on stderr: they are what a question is about, not a result."""
        if self.as_json:
            return
        if sys.stderr.isatty():
            _rich_panel(title, grouped(groups)[1:])
        else:
            for line in [title, *grouped(groups), ""]:
                _say(line)

    def confirmed(self, question: str) -> bool:
        """Ask on stderr; an empty answer is yes."""
        sys.stderr.write(f"{question} (Y/n): ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
        return answer.strip().lower() in ("", "y", "yes") and answer != ""

    def raw(self, chunk: bytes) -> None:
        """Bytes as they are, at once."""
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def error(failure: RelumeError, *, as_json: bool) -> None:
    """The end of a command that failed."""
    if as_json:
        _print(_json({"error": failure.as_dict()}))
        return
    first, *more = failure.message.splitlines() or [failure.code]
    _say(f"✗ {first}")
    for line in more:
        _say(f"✗ {line}" if failure.details.get("problems") else f"  {line}")
    if failure.hint:
        _say(f"  {failure.hint}")


def interrupted() -> None:
    _say("\n✗ Cancelled")


def grouped(groups: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Named groups of settings as lines, each group after an empty one."""
    lines: list[str] = []
    for group, settings in groups.items():
        width = max(map(len, settings)) + 1
        lines += ["", group, *(f"  {name + ':':<{width}} {value}" for name, value in settings.items())]
    return lines


def duration(seconds: float) -> str:
    """Short and readable: 0.0042 -> 4.2 ms, 0.184 -> 184 ms, 12.3 -> 12.3 s."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"


def size(count: float) -> str:
    """Bytes in powers of 1000, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _cell(field: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if field.endswith("_bytes") and isinstance(value, (int, float)):
        return size(value)
    if field.endswith("_at") and isinstance(value, (int, float)):
        return _moment(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def _moment(epoch: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(epoch).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _plain_table(headings: list[str], cells: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    for line in [headings, *cells]:
        _print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _rich_table(headings: list[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for line in cells:
        table.add_row(*map(Text, line))
    Console().print(table)


def _rich_panel(title: str, lines: list[str]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text("\n".join(lines)), title=title, expand=False, padding=(1, 2)))


def _json(value: Any, indent: int | None = None) -> str:
    """In ASCII, so that any stream takes it, and a name that is no UTF-8 comes through whole (os.fsencode)."""
    return json.dumps(value, indent=indent, default=str)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _say(line: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
