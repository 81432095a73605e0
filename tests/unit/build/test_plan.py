"""The inputs of a build, and the id made from them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relume.build import base, files, plan
from relume.config import load_app
from relume.errors import BuildError

CONFIG = """
[cerebrium.deployment]
name = "app"
{deployment}
[cerebrium.runtime.custom]
entrypoint = {entrypoint}
port = 8000
[cerebrium.hardware]
memory = {memory}
[cerebrium.experimental]
checkpointing = {checkpointing}
[cerebrium.dependencies.pip]
{pip}
[cerebrium.dependencies.apt]
{apt}
[cerebrium.dependencies.paths]
{paths}
"""


def read(directory: Path, **values: str) -> plan.Plan:
    defaults = {
        "deployment": "",
        "entrypoint": '["python", "main.py"]',
        "memory": "2.0",
        "checkpointing": "true",
        "pip": 'idna = "3.7"',
        "apt": "",
        "paths": "",
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "cerebrium.toml").write_text(values.pop("comment", "") + CONFIG.format(**defaults | values))
    (directory / "main.py").write_text("print('hi')")
    config = load_app(directory)
    deployment = config.deployment
    found = files.scan(directory, deployment.include, deployment.exclude)
    name = asyncio.run(base.identify(deployment.docker_base_image_url, directory))
    return plan.plan(config, directory, found, name, "guest")


def test_the_same_app_elsewhere_with_other_comments_and_hardware(tmp_path: Path) -> None:
    one = read(tmp_path / "one")
    other = read(tmp_path / "some/where", comment="# hello\n", memory="16.0")
    assert one.inputs_digest == other.inputs_digest


@pytest.mark.parametrize(
    "change",
    [
        {"entrypoint": '["python", "-u", "main.py"]'},
        {"checkpointing": "false"},
        {"pip": 'idna = "3.8"'},
        {"pip": ""},
        {"apt": 'jq = "latest"'},
        {"deployment": 'python_version = "3.12"'},
        {"deployment": 'docker_base_image_url = "debian:trixie-slim"'},
        {"deployment": 'shell_commands = ["true"]'},
        {"deployment": 'pre_build_commands = ["true"]'},
        {"deployment": "use_uv = true"},
    ],
)
def test_every_input_counts(tmp_path: Path, change: dict[str, str]) -> None:
    assert read(tmp_path / "one").inputs_digest != read(tmp_path / "other", **change).inputs_digest


def test_pre_build_and_shell_commands_are_not_the_same(tmp_path: Path) -> None:
    one = read(tmp_path / "one", deployment='shell_commands = ["true"]')
    other = read(tmp_path / "other", deployment='pre_build_commands = ["true"]')
    assert one.inputs_digest != other.inputs_digest


def test_a_requirements_file_counts_with_all_it_includes(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "reqs").mkdir()
    (app / "reqs/all.txt").write_text("-r more.txt\n--constraint=../limits.txt\nidna\n")
    (app / "reqs/more.txt").write_text("six\n")
    (app / "limits.txt").write_text("six<2\n")
    made = read(app, paths='pip = "reqs/all.txt"')
    assert list(made.requirements.files) == ["reqs/all.txt", "reqs/more.txt", "reqs/../limits.txt"]
    assert not made.requirements.local
    before = made.inputs_digest
    (app / "reqs/more.txt").write_text("six==1.16\n")
    assert read(app, paths='pip = "reqs/all.txt"').inputs_digest != before


def test_requirement_files_stay_inside(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "requirements.txt").write_text("-r ../../../etc/passwd\n")
    with pytest.raises(BuildError, match="must lie in the app's directory"):
        read(app, paths='pip = "requirements.txt"')
    with pytest.raises(BuildError, match=r"missing\.txt: cannot be read"):
        read(app, paths='pip = "missing.txt"')


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("./wheels/one.whl", True),
        ("../one", True),
        ("-e .", True),
        (".[extra]", True),
        (".", True),
        ("--find-links wheels", True),
        ("one @ file:///cortex/one", True),
        ("wheels/one-1.0-py3-none-any.whl", True),
        ("https://example.org/one.whl", False),
        ("one[extra]==1.0", False),
        ("git+https://example.org/one.git@v1", False),
        ("# ./comment", False),
    ],
)
def test_requirements_that_need_the_apps_files(tmp_path: Path, line: str, local: bool) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "requirements.txt").write_text(f"{line}\n")
    assert read(app, paths='pip = "requirements.txt"').requirements.local is local


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("torch", "latest", "torch"),
        ("torch", "", "torch"),
        ("torch", "*", "torch"),
        ("torch", "2.1", "torch==2.1"),
        ("torch", "==2.1", "torch==2.1"),
        ("torch", ">=2,<3", "torch>=2,<3"),
        ("torch", "~=2.1", "torch~=2.1"),
        ("uvicorn[standard]", "latest", "uvicorn[standard]"),
        ("git+https://example.org/a.git@main", "latest", "git+https://example.org/a.git@main"),
        ("a", "git+https://example.org/a.git", "a @ git+https://example.org/a.git"),
        ("a", "@ https://example.org/a.whl", "a @ https://example.org/a.whl"),
    ],
)
def test_pip_tables(name: str, version: str, expected: str) -> None:
    assert plan.requirement(name, version) == expected


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("jq", "latest", "jq"),
        ("jq", "1.6-2.1+deb12u3", "jq=1.6-2.1+deb12u3"),
        ("jq", "==1.6", "jq=1.6"),
        ("libc6:i386", "*", "libc6:i386"),
    ],
)
def test_apt_tables(name: str, version: str, expected: str) -> None:
    assert plan.apt_package(name, version) == expected


@pytest.mark.parametrize(
    ("name", "version"), [("jq", ">=1.5"), ("jq; rm -rf /", "latest"), ("-o", "x"), ("JQ", "")]
)
def test_apt_entries_that_are_refused(name: str, version: str) -> None:
    with pytest.raises(BuildError):
        plan.apt_package(name, version)


def test_an_apt_file(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "pkglist.txt").write_text("# tools\njq  curl=7.88\n\nffmpeg # video\njq\n")
    assert read(app, paths='apt = "pkglist.txt"').apt == ("jq", "curl=7.88", "ffmpeg")
    (app / "pkglist.txt").write_text("jq\n--allow-downgrades\n")
    with pytest.raises(BuildError, match=r"pkglist\.txt:2"):
        read(app, paths='apt = "pkglist.txt"')


def test_conda_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="conda") as caught:
        read(tmp_path / "app", apt='jq = "latest"\n[cerebrium.dependencies.conda]\ncudatoolkit = "11"')
    assert "pip" in caught.value.hint


def test_the_id_covers_inputs_layers_and_their_order() -> None:
    layers = ["a" * 64, "b" * 64]
    first = plan.build_id("i", layers, 0)
    assert len(first) == 32
    assert first == plan.build_id("i", list(layers), 0)
    others = {
        plan.build_id("j", layers, 0),
        plan.build_id("i", layers[::-1], 0),
        plan.build_id("i", layers[:1], 0),
        plan.build_id("i", layers, 1),
    }
    assert len(others | {first}) == 5


def test_the_runner_becomes_part_of_the_inputs(tmp_path: Path) -> None:
    made = read(tmp_path / "app")
    served = plan.with_runner(made, ("python3", "-m", "relume_runner"), ("uvicorn",))
    assert served.requirements.lines == ("idna==3.7", "uvicorn")
    assert served.inputs_digest != made.inputs_digest


@pytest.mark.parametrize(
    ("entrypoint", "pip", "needed"),
    [
        ('["python", "main.py"]', "", True),
        ('["redis-server"]', "", False),
        ('["redis-server"]', 'idna = "latest"', True),
        ('"exec uvicorn main:app > log"', "", True),
    ],
)
def test_whether_python_is_needed(tmp_path: Path, entrypoint: str, pip: str, needed: bool) -> None:
    assert read(tmp_path / "app", entrypoint=entrypoint, pip=pip).needs_python is needed
