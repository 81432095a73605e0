"""CRIU's dump.log and restore.log in words: what failed, who holds what, and what to do.

Guarantees: an answer in one line, never a raw log; culprits with the pid inside wherever the log tells of
whom it speaks. Does not guess: a line that no rule of _criu_rules.py knows is quoted, without its decoration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from relume.engine._criu_rules import ANYWHERE, DUMP, NOISE, RESTORE, Kind, Rule
from relume.engine._culprit import Culprit
from relume.linux import proc

__all__ = ["Culprit", "Explanation", "Who", "explain", "explain_text", "living"]

_ERROR = re.compile(r"Error \((?P<place>[^)]*)\): (?P<text>.*)")
_PID = re.compile(r"\(pid: (?P<pid>\d+)[ )]")
_RULES = (*ANYWHERE, *DUMP, *RESTORE)

Who = tuple[int, str]
"""The pid inside and the name of a process."""


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """Why a dump or restore failed. ``culprits`` are set for ``unsupported`` and ``busy`` where known."""

    reason: str
    kind: Kind
    hint: str = ""
    culprits: tuple[Culprit, ...] = ()


def living(pid: int) -> Who | None:
    """Who the process with this host pid is, while it lives (it does after a failed dump)."""
    try:
        status = proc.status(pid)
    except proc.GONE:
        return None
    return status.inside, status.name


def explain(log: Path, *, who: Callable[[int], Who | None] = living) -> Explanation:
    """What CRIU's log file says went wrong; the first cause counts. ``reason`` is "" if it says nothing.

    ``who`` turns a host pid into a name; for a pid that it does not know, the culprit is "a process".
    """
    try:
        text = log.read_text(errors="replace")
    except FileNotFoundError:
        return Explanation("", "engine")
    return explain_text(text, who=who)


def explain_text(log: str, *, who: Callable[[int], Who | None] = living) -> Explanation:
    """:func:`explain` for the text of a log (verbosity 1 or more)."""
    lines = log.splitlines()
    unknown: list[str] = []
    for number, line in enumerate(lines):
        error = _ERROR.search(line)
        if error is None or NOISE.search(error["text"]):
            continue
        for rule in _RULES:
            match = rule.pattern.search(error["text"])
            if match is not None:
                return _told(rule, match, who(_whose(lines, number, match)))
        unknown.append(error["text"].strip())
    if unknown:
        return Explanation(f"CRIU: {'; '.join(dict.fromkeys(unknown[:3]))}", "engine")
    return Explanation("", "engine")


def _told(rule: Rule, match: re.Match[str], who: Who | None) -> Explanation:
    what = rule.what.format(**{name: value or "" for name, value in match.groupdict().items()})
    if rule.kind not in ("unsupported", "busy"):
        return Explanation(what, rule.kind, rule.hint)
    pid, name = (who or (0, "a process")) if rule.names_process else (0, "")
    culprit = Culprit(pid, name, what, rule.hint)
    return Explanation(str(culprit), rule.kind, rule.hint, (culprit,))


def _whose(lines: list[str], number: int, match: re.Match[str]) -> int:
    """The host pid that the line at ``number`` is about; 0 when the log does not say.

    Many lines name nobody. CRIU then names the process when it gives up on it, a few lines further down
    ("Dump files (pid: 123) failed with -1"), and, in a log with more than errors, when it begins with it.
    """
    named = match.groupdict().get("pid")
    if named:
        return int(named)
    for line in lines[number:]:
        if "Error (" in line and (found := _PID.search(line)):
            return int(found["pid"])
    for line in reversed(lines[:number]):
        if found := _PID.search(line):
            return int(found["pid"])
    return 0
