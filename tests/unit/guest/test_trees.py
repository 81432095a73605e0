"""What the build room copies into containers: complete, free of the host's packages, old enough in syntax."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from relume import guest


def _sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def test_the_sdk_is_importable_alone(tmp_path: Path) -> None:
    """Isolated (-I) and without site-packages (-S), from a copy: only the standard library is there."""
    shutil.copytree(guest.sdk_tree(), tmp_path / "site")
    program = (
        f"import sys; sys.path.append({str(tmp_path / 'site')!r}); import relume; print(relume.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site" / "relume" / "__init__.py")


def test_the_sdk_outside_relume_says_so_at_once(tmp_path: Path) -> None:
    shutil.copytree(guest.sdk_tree(), tmp_path / "site")
    program = (
        f"import sys; sys.path.append({str(tmp_path / 'site')!r}); import relume;"
        "r = relume.checkpoint(); print(r.status, r.restored, relume.restore_id(), relume.refresh_env())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == "outside False None {}", done.stderr


@pytest.mark.parametrize("source", _sources(guest.sdk_tree() / "relume"), ids=lambda path: path.name)
def test_the_sdk_parses_on_python_3_8(source: Path) -> None:
    ast.parse(source.read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(
    "source", _sources(guest.runner_tree() / "relume_runner"), ids=lambda path: path.name
)
def test_the_runner_parses_on_python_3_10(source: Path) -> None:
    ast.parse(source.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize(
    "source",
    _sources(guest.sdk_tree() / "relume") + _sources(guest.runner_tree() / "relume_runner"),
    ids=lambda path: path.name,
)
def test_guest_code_imports_nothing_of_the_host_package(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert (node.module or "").split(".")[0] != "relume"
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, "a relative import must stay in its package"


def test_runner_requirements_are_names_with_bounds() -> None:
    requirements = guest.runner_requirements()
    assert {line.split(">=")[0] for line in requirements} == {"uvicorn", "starlette"}
    assert all(",<" in line for line in requirements)


def test_runner_argv() -> None:
    assert guest.runner_argv(9000, concurrency=3) == (
        *("python3", "-m", "relume_runner"),
        *("--port", "9000"),
        *("--concurrency", "3"),
    )
