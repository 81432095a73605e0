"""CRIU's dump.log and restore.log in words: what failed, who holds what, and what to do.

Guarantees: an answer in one line, never a raw log; culprits with the pid inside wherever the log tells of
whom it speaks. Does not guess: a line that no rule of _criu_rules.py knows is quoted, without its decoration.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from relume.engine._criu_rules import ANYWHERE, DUMP, NOISE, RESTORE, Kind, Rule
from relume.engine._culprit import Culprit
from relume.linux import proc

__all__ = ["Culprit", "Explanation", "Who", "explain", "known"]

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


def known(pids: Iterable[int]) -> dict[int, Who]:
    """Who the processes with these host pids are, for :func:`explain`; to be asked while they live."""
    found = {}
    for pid in pids:
        try:
            status = proc.status(pid)
        except proc.GONE:
            continue
        found[pid] = (status.inside, status.name)
    return found


def explain(log: str, processes: Mapping[int, Who]) -> Explanation:
    """What the text of a log of CRIU's (verbosity 1 or more) says went wrong; the first cause counts.

    ``processes`` is from :func:`known`; a pid that is not in it is given as the log has it.
    """
    lines = log.splitlines()
    unknown: list[str] = []
    for number, line in enumerate(lines):
        error = _ERROR.search(line)
        if error is None or NOISE.search(error["text"]):
            continue
        for rule in _RULES:
            match = rule.pattern.search(error["text"])
            if match is not None:
                return _told(rule, match, _whose(lines, number, match), processes)
        unknown.append(error["text"].strip())
    if unknown:
        return Explanation(f"CRIU: {'; '.join(dict.fromkeys(unknown[:3]))}", "engine")
    return Explanation("CRIU failed without saying why", "engine", "see the node's log")


def _told(rule: Rule, match: re.Match[str], pid: int, processes: Mapping[int, Who]) -> Explanation:
    words = {name: value or "" for name, value in match.groupdict().items()}
    what = rule.what.format(**words)
    if not rule.names_process:
        culprits = (Culprit(0, "", what, rule.hint),) if rule.kind in ("unsupported", "busy") else ()
        return Explanation(what, rule.kind, rule.hint, culprits)
    inside, name = processes.get(pid, (pid, "a process"))
    culprit = Culprit(inside, name, what, rule.hint)
    return Explanation(str(culprit) if inside else f"a process {what}", rule.kind, rule.hint, (culprit,))


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
