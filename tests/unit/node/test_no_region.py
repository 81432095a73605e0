"""A node without a region pays nothing for it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["relume.node.main", "relume.keeper.__main__", "relume.pager.__main__"])
def test_nothing_of_the_store_is_imported(module: str) -> None:
    code = f"""
import importlib, sys
importlib.import_module({module!r})
print([name for name in sys.modules if name.startswith(("obstore", "cryptography", "relume.store"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
