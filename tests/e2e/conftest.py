"""End-to-end tests need root, real runc and CRIU, and more time than unit tests."""

from __future__ import annotations

import os

import pytest

_TIMEOUT = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" not in item.path.parts:
            continue
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_TIMEOUT))
        if os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
