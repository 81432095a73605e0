"""No node, a node that refuses, dies or talks nonsense: an error that says what to do, never a traceback."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relume.cli.client import NodeClient, error_of
from relume.errors import RelumeError, Unsupported

Relume = Callable[..., Any]


def test_no_node_says_how_to_start_one(state: Path, relume: Relume) -> None:
    ran = relume("ps")
    assert ran.status == 3
    assert ran.out == ""
    assert f"✗ no node answers on {state}/node.sock" in ran.err
    assert "relume node run" in ran.err
    error = relume("node", "status", "-o", "json").json["error"]
    assert error["code"] == "node_unreachable"
    assert "relume node run" in error["hint"]


def test_a_socket_that_nobody_listens_on(state: Path, relume: Relume) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(state / "node.sock"))
    assert relume("ps").status == 3


def test_a_refusal_keeps_code_hint_details_and_exit_status(node: Any, relume: Relume) -> None:
    node.refuse("POST /v1/stop", 404, code="not_found", message="no app x", hint="relume apps ls", near=["y"])
    ran = relume("stop", "x")
    assert (ran.status, ran.err) == (4, "✗ no app x\n  relume apps ls\n")
    error = relume("stop", "x", "--output=json").json["error"]
    assert error == {"code": "not_found", "message": "no app x", "hint": "relume apps ls", "near": ["y"]}


def test_an_error_at_the_end_of_a_stream(node: Any, relume: Relume) -> None:
    error = {"code": "build", "message": "pip failed\nlast line", "hint": ""}
    node.lines("POST /v1/apps/hello/start", {"progress": "building"}, {"error": error})
    ran = relume("start", "hello")
    assert (ran.status, ran.err) == (1, "• building\n✗ pip failed\n  last line\n")
    assert relume("start", "hello", "-o", "json").json["error"]["code"] == "build"


def test_a_stream_without_an_end(node: Any, relume: Relume) -> None:
    node.lines("POST /v1/apps/hello/start", {"progress": "restoring"})
    ran = relume("start", "hello")
    assert ran.status == 3
    assert "went away" in ran.err


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\n\r\n{",
        b"HTTP/1.1 500 Oh\r\n\r\n<html>",
        b"x" * 100_000,
    ],
)
def test_a_node_that_talks_nonsense(state: Path, relume: Relume, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state / "node.sock"))
        listener.listen()

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.recv(65536)
                connected.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        ran = relume("ps", "-o", "json")
        thread.join()
    assert ran.status == 3
    assert ran.json["error"]["code"] == "node_unreachable"


def test_errors_come_back_as_their_class() -> None:
    assert isinstance(error_of({"code": "unsupported", "message": "m", "culprits": []}), Unsupported)
    strange = error_of({"code": "gpu/driver", "message": "m"})
    assert isinstance(strange, RelumeError)
    assert strange.as_dict() == {"code": "gpu/driver", "message": "m", "hint": ""}


def test_a_socket_of_somebody_else(state: Path, relume: Relume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, which runs these tests, may connect to any; so the refusal is made up."""

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("relume.cli.client.request", refused)
    ran = relume("ps")
    assert ran.status == 3
    assert "no permission" in ran.err
    assert "root" in ran.err


def test_a_state_directory_of_any_length(tmp_path: Path) -> None:
    state = tmp_path / ("x" * 120)
    state.mkdir()
    folder = os.open(state, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/node.sock")
        os.close(folder)
        listener.listen()

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.recv(65536)
                connected.sendall(b"HTTP/1.0 200 OK\r\n\r\n[1]")

        thread = threading.Thread(target=serve)
        thread.start()
        assert NodeClient(state).get("/v1/instances") == [1]
        thread.join()


@pytest.mark.parametrize(
    "arguments",
    [
        ["strat", "x"],
        ["start"],
        ["ps", "-o", "yaml"],
        ["ps", "--no-such"],
        ["deploy", "--fre"],
        ["checkpoints"],
        ["checkpoints", "list"],
        ["secrets", "rm", "app"],
    ],
)
def test_command_lines_that_are_none(relume: Relume, arguments: list[str]) -> None:
    ran = relume(*arguments)
    assert ran.status == 2
    assert ran.err.startswith("✗ ")
    assert "--help" in ran.err
    if "-o" not in arguments:
        assert relume(*arguments, "-o", "json").json["error"]["code"] == "bad_request"


def test_no_command_prints_help(relume: Relume) -> None:
    ran = relume()
    assert ran.status == 2
    assert "checkpoints" in ran.err


def test_version_and_help(relume: Relume) -> None:
    assert relume("--version").out.startswith("relume ")
    ran = relume("start", "--help")
    assert ran.status == 0
    assert "--no-restore" in ran.out


def test_ctrl_c_is_quiet(node: Any, relume: Relume, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NodeClient, "get", interrupted)
    ran = relume("ps")
    assert (ran.status, ran.out, ran.err) == (130, "", "\n✗ Cancelled\n")
