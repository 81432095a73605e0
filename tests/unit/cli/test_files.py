"""`init`, `check` and `deploy`: the commands that read an app's directory."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Relume = Callable[..., Any]
SHAPES = Path(__file__).parents[1] / "config" / "shapes"


def test_what_init_makes_is_understood(
    relume: Relume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert relume("init", "my-app").out == f"{tmp_path}/my-app\n"
    ran = relume("check", "my-app", "--strict", "-o", "json")
    assert ran.status == 0
    assert ran.json["app"] == "my-app"
    assert ran.json["checkpointing"] is True
    assert ran.json["warnings"] == []
    compile((tmp_path / "my-app/main.py").read_text(), "main.py", "exec")


def test_init_overwrites_nothing(relume: Relume, tmp_path: Path) -> None:
    (tmp_path / "cerebrium.toml").write_text("mine")
    ran = relume("init", "my-app", "--dir", tmp_path)
    assert ran.status == 1
    assert (tmp_path / "cerebrium.toml").read_text() == "mine"
    assert relume("init", "../x").status == 2
    assert relume("init", "x", "--dir", tmp_path / "cerebrium.toml").status == 1


@pytest.mark.parametrize("shape", sorted(path.name for path in SHAPES.iterdir()))
def test_check_understands_every_shape(relume: Relume, shape: str) -> None:
    ran = relume("check", SHAPES / shape)
    assert ran.status == 0
    assert "HARDWARE" in ran.out
    assert relume("check", SHAPES / shape, "-o", "json").json["config"]["deployment"]["name"]


def test_check_says_what_it_understood(relume: Relume) -> None:
    ran = relume("check", SHAPES / "vllm-checkpointing")
    for line in (
        "  Compute: HOPPER_H100, HOPPER_H200 x 2",
        "  Ready when:    GET /v1/models",
        "  Checkpointing: on",
        "  pip: vllm, git+https://github.com/example/tokenizer-extras.git@v1.2#egg=extras",
    ):
        assert line in ran.out.splitlines()
    assert "cerebrium.hardware.region: not acted on" in ran.err


def test_check_of_files_that_are_wrong(relume: Relume, tmp_path: Path) -> None:
    assert relume("check", tmp_path).status == 2
    (tmp_path / "cerebrium.toml").write_text(
        '[cerebrium.deployment]\nname = "a"\n[cerebrium.hardware]\ncpu = -1\nmemory = 0\n'
    )
    ran = relume("check", tmp_path)
    assert ran.status == 2
    assert len([line for line in ran.err.splitlines() if line.startswith("✗")]) == 2
    error = relume("check", tmp_path, "-o", "json").json["error"]
    assert (error["code"], error["line"], error["value"]) == ("config", 4, "-1")


def test_check_strict(relume: Relume, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('[cerebrium.deployment]\nname = "a"\nport = 1\n')
    assert relume("check", "--config-file", tmp_path / "other.toml").status == 0
    assert relume("check", "--config-file", tmp_path / "other.toml", "--strict").status == 2


def test_deploy(node: Any, relume: Relume) -> None:
    shape = SHAPES / "fastapi-custom"
    ran = relume("deploy", shape, "-y", "--fresh", "--name", "other")
    assert ran.status == 0
    assert ran.out == "✓ hello is deployed in 12.3 s: build b-1 (built, not in the region)\n"
    lines = ran.err.splitlines()
    assert "DEPLOYMENT CONFIGURATION" in lines
    assert lines[-5:] == [
        "✓ Loaded 3 files",
        "  pip: numpy",
        "✓ Built app",
        "! the region: it is away",
        "  next: relume start hello",
    ]
    assert node.calls == [("POST", "/v1/deploy", {"directory": str(shape), "fresh": True, "name": "other"})]


def test_deploy_as_json(node: Any, relume: Relume) -> None:
    ran = relume("deploy", SHAPES / "minimal", "-y", "-o", "json")
    assert (ran.json["app"], ran.json["build_id"], ran.json["seconds"]) == ("hello", "b-1", 12.34)
    assert (ran.json["how"], ran.json["in_region"], ran.json["reason"]) == ("built", False, "it is away")


def test_deploy_with_another_file_hands_on_an_absolute_path(
    node: Any, relume: Relume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.toml").write_text('[cerebrium.deployment]\nname = "a"\n')
    assert relume("deploy", "-y", "--config-file", "other.toml").status == 0
    body = {"directory": str(tmp_path), "fresh": False, "config_file": str(tmp_path / "other.toml")}
    assert node.calls == [("POST", "/v1/deploy", body)]


@pytest.mark.parametrize("shape", ["rime-partner", "neuron"])
def test_deploy_refuses_what_no_node_can_run(node: Any, relume: Relume, shape: str) -> None:
    ran = relume("deploy", SHAPES / shape, "-y")
    assert ran.status == 2
    assert node.calls == []


def test_deploy_with_nobody_to_ask(node: Any, relume: Relume, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        ran = relume("deploy", SHAPES / "minimal")
    assert ran.status == 2
    assert "use -y" in ran.err
    assert node.calls == []


def _on_a_terminal(answer: str, *arguments: str) -> tuple[int, str]:
    """Run the command on a pty; its exit status and all that the terminal saw."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "relume.cli.main", *arguments]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    os.write(master, answer.encode())
    seen = b""
    try:
        while chunk := os.read(master, 4096):
            seen += chunk
    except OSError:  # EIO: the other end is closed
        pass
    os.close(master)
    return process.wait(), seen.decode()


def test_deploy_asks_on_a_terminal(node: Any) -> None:
    status, seen = _on_a_terminal("\n", "deploy", str(SHAPES / "minimal"))
    assert status == 0
    assert "╭" in seen
    assert "Do you want to deploy? (Y/n):" in seen
    assert "✓ Built app" in seen
    status, seen = _on_a_terminal("n\n", "deploy", str(SHAPES / "minimal"))
    assert status == 1
    assert "Nothing was deployed" in seen
    assert [call[1] for call in node.calls] == ["/v1/deploy"]


def test_listings_are_drawn_on_a_terminal(node: Any) -> None:
    status, seen = _on_a_terminal("", "checkpoints", "ls")
    assert status == 0
    assert "\x1b[1mCHECKPOINT" in seen
    assert "cp-1" in seen


def test_a_reader_that_has_seen_enough(node: Any) -> None:
    node.answers["GET /v1/secrets/hello"] = lambda _: [f"NAME_{i}" for i in range(100_000)]
    process = subprocess.Popen(
        [sys.executable, "-m", "relume.cli.main", "secrets", "list", "hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.wait() == 141
