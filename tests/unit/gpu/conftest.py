"""The fake driver, compiled once, and apps that hold device memory on it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))

from fake_driver import FakeMachine, compile_library

from relume.gpu.check import Workload, workload
from relume.gpu.client import DriverHelper


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fake-cuda")
    compile_library(folder)
    return folder


@pytest.fixture
def fake(library: Path, tmp_path: Path) -> FakeMachine:
    machine = FakeMachine(tmp_path)
    machine.library.symlink_to(library)
    machine.describe()
    return machine


@pytest.fixture
async def start_app(fake: FakeMachine) -> AsyncIterator[Callable[..., Any]]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(size: int = 8 << 20, blocks: int = 2) -> Workload:
            app = await stack.enter_async_context(workload(fake.env))
            await app.ask("fill", size=size, blocks=blocks, seed=app.pid)
            return app

        yield start


@pytest.fixture
async def app(start_app: Callable[..., Any]) -> Workload:
    started: Workload = await start_app()
    return started


@pytest.fixture
async def helper(fake: FakeMachine) -> AsyncIterator[DriverHelper]:
    async with DriverHelper(env=fake.env) as running:
        yield running


@pytest.fixture
def no_gpu(tmp_path: Path) -> dict[str, str]:
    """An environment in which no driver loads, on a machine with a GPU too: the libraries are empty files."""
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (tmp_path / name).touch()
    return {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
