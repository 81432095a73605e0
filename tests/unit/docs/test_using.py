"""docs/using.md against the code: the sidecar's calls, fields, reasons and statuses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from relume.checkpoint.policy import SkipReason

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src/relume"
PAGE = (ROOT / "docs/using.md").read_text()
SIDECAR = PAGE.partition("### The sidecar")[2].partition("\n## ")[0]
NAMES = set(re.findall(r"`(\w+)`", SIDECAR))


def calls(module: str, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse((SOURCE / module).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
            yield node


def literals(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.value


def test_every_field_of_the_answer_to_a_post_is_documented() -> None:
    fields = {
        key.arg for call in calls("checkpoint/capture.py", "_answer") for key in call.keywords if key.arg
    }
    assert {"frozen_ms", "size_bytes", "checkpoint_id"} <= fields
    assert fields - NAMES == set()


def test_every_reason_to_skip_is_documented_in_its_order() -> None:
    row = SIDECAR.partition("| `reason` |")[2].partition("\n")[0]
    places = [row.index(f"`{reason}`") for reason in get_args(SkipReason)]
    assert places == sorted(places)


def test_every_reason_to_fail_is_documented() -> None:
    reasons = {
        reason
        for call in calls("checkpoint/capture.py", "_answer")
        for reason in literals(call.args[2:3])
        if reason not in get_args(SkipReason)
    }
    assert "engine" in reasons
    assert reasons - NAMES == set()


@pytest.mark.parametrize("function", ["_error", "_Refused"])
def test_every_status_of_the_sidecar_is_documented(function: str) -> None:
    statuses = {
        str(part.value)
        for call in calls("sidecar/server.py", function)
        for part in ast.walk(call.args[0])
        if isinstance(part, ast.Constant)
    }
    assert statuses
    assert statuses <= set(re.findall(r"\b[45]\d\d\b", SIDECAR))
