"""docs/errors.md against errors.py: every code once, with its exit status."""

from __future__ import annotations

import re
from pathlib import Path

from relume import errors

PAGE = (Path(__file__).parents[3] / "docs/errors.md").read_text()


def all_errors() -> set[type[errors.RelumeError]]:
    public = vars(errors).values()
    return {item for item in public if isinstance(item, type) and issubclass(item, errors.RelumeError)}


def test_every_error_is_documented_with_its_exit_status() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \|", PAGE, re.MULTILINE)
    documented = {code: int(status) for code, status in rows}
    assert len(documented) == len(rows)
    assert documented == {error.code: error.exit_code for error in all_errors()}


def test_every_error_says_in_its_docstring_what_it_is() -> None:
    assert not [error.__name__ for error in all_errors() if not (error.__doc__ or "").strip()]
