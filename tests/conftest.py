"""For all tests: a property holds or not; how long an example takes on a busy machine says nothing about that."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("relume", deadline=None)
settings.load_profile("relume")

_HERE = Path(__file__).parent
_TIMEOUTS = {"e2e": 300, "store": 300}
"""Seconds for a test that names none, by suite: real runc and CRIU, and real servers, take more than units do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        timeout = _TIMEOUTS.get(item.path.relative_to(_HERE).parts[0])
        if timeout is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(timeout))
