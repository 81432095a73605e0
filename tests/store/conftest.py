"""The store against real servers on loopback: no containers and no root, but more time than unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_TIMEOUT = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TIMEOUT))
