"""The apps of the suite, their checks, and what became of each."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: Where results are collected, one JSON object by app; report.py makes the page from it.
RESULTS = Path(os.environ.get("RELUME_APPS_RESULTS", ROOT / "build" / "apps.json"))


def names() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/check.py"))


def load_check(name: str) -> ModuleType:
    """An app's ``check.py``: ``TITLE``, ``FAST``, ``check(ask)``, and ``UNSUPPORTED`` where that is the point."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location(f"check_{name.replace('-', '_')}", HERE / name / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(name: str, facts: dict[str, Any]) -> None:
    """Put one app's result beside those that are there."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = facts
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
