"""Each verb: what it asks the node, what it prints for people and for programs."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from relume.cli.main import main

Relume = Callable[..., Any]


def test_ps(node: Any, relume: Relume) -> None:
    ran = relume("ps")
    assert ran.status == 0
    heading, row = ran.out.splitlines()
    assert heading.split() == ["INSTANCE", "APP", "BUILD", "STATE", "RESTORED", "URL", "MEMORY", "STARTED"]
    assert row.split()[:7] == ["i-1", "hello", "b-1", "ready", "yes", "http://127.0.0.1:1", "123"]
    assert ran.err == ""


def test_ps_as_json_is_what_the_node_said(node: Any, relume: Relume) -> None:
    (row,) = relume("ps", "-o", "json").json
    assert row["memory_bytes"] == 123_456_789
    assert row["restored"] is True


def test_an_empty_listing(node: Any, relume: Relume) -> None:
    node.answers["GET /v1/instances"] = lambda _: []
    ran = relume("ps")
    assert (ran.status, ran.out, ran.err) == (0, "", "No instances.\n")
    assert relume("ps", "-o", "json").json == []


def test_start(node: Any, relume: Relume) -> None:
    ran = relume("start", "hello", "--env", "A=1", "--env=B=x=y")
    assert ran.status == 0
    assert ran.out.splitlines() == [
        "✓ hello is ready in 184 ms: restored from cp-1",
        "  instance  i-1",
        "  url       http://127.0.0.1:1",
    ]
    assert ran.err == "• restoring cp-1\n"
    body = {"restore": True, "explain": False, "env": {"A": "1", "B": "x=y"}}
    assert node.calls == [("POST", "/v1/apps/hello/start", body)]


def test_start_cold_says_why(node: Any, relume: Relume) -> None:
    result = {
        "app": "hello",
        "instance_id": "i-2",
        "url": "u",
        "ready_s": 5,
        "restored": False,
        "reason": "no checkpoint",
    }
    node.lines("POST /v1/apps/hello/start", {"result": result})
    ran = relume("start", "hello", "--no-restore")
    assert ran.out.startswith("✓ hello is ready in 5.0 s: booted cold (no checkpoint)\n")
    assert node.calls[0][2]["restore"] is False


def test_start_trace(node: Any, relume: Relume) -> None:
    lines = relume("start", "hello", "--trace").out.splitlines()
    assert lines[3:] == ["  since the start", "    lookup    0.4 ms", "    criu       90 ms"]


def test_start_explain_shows_a_plan(node: Any, relume: Relume) -> None:
    plan = {"app": "hello", "would_restore": False, "checkpoint_id": None, "reason": "platform differs"}
    node.lines("POST /v1/apps/hello/start", {"result": plan})
    ran = relume("start", "hello", "--explain")
    assert "would_restore  no" in ran.out
    assert "reason         platform differs" in ran.out
    assert node.calls[0][2]["explain"] is True


def test_start_as_json(node: Any, relume: Relume) -> None:
    ran = relume("start", "hello", "-o", "json")
    assert ran.json["ready_s"] == 0.1842
    assert ran.json["trace"] == {"lookup": 0.0004, "criu": 0.09}


def test_environment_files(
    node: Any, relume: Relume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", "from here")
    monkeypatch.delenv("NOT_SET", raising=False)
    file = tmp_path / "env"
    file.write_text('# a comment\n\nA=1\n  B= "kept as it is" \nMINE\nNOT_SET\n')
    relume("start", "hello", "--env-file", file, "-e", "A=2")
    assert node.calls[0][2]["env"] == {"A": "2", "B": ' "kept as it is" ', "MINE": "from here"}


@pytest.mark.parametrize("bad", ["=1", "A B=1", "", "A\x00=1"])
def test_what_is_no_variable(node: Any, relume: Relume, bad: str) -> None:
    ran = relume("start", "hello", "--env", bad, "-o", "json")
    assert ran.status == 2
    assert ran.json["error"]["code"] == "bad_request"
    assert node.calls == []


def test_an_environment_file_that_is_none(node: Any, relume: Relume, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"A=\xe9\n")
    (tmp_path / "large").write_bytes(b"#" * 2_000_000)
    for name in ("missing", "latin", "large", "."):
        assert relume("start", "hello", "--env-file", tmp_path / name).status == 2


def test_stop(node: Any, relume: Relume) -> None:
    assert relume("stop", "hello").out == "i-1\n"
    assert relume("stop", "i-1", "-o", "json").json == {"stopped": ["i-1"]}
    assert node.calls[0] == ("POST", "/v1/stop", {"target": "hello"})
    node.answers["POST /v1/stop"] = lambda _: {"stopped": []}
    ran = relume("stop", "hello")
    assert (ran.status, ran.out, ran.err) == (0, "", "! nothing of hello was running\n")


def test_logs_are_raw_bytes(node: Any, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    node.answers["GET /v1/logs/i-1"] = lambda _: web.Response(body=b"\xff\x00 line\r\nno end")
    assert main(["logs", "i-1", "-f"]) == 0
    captured = capfdbinary.readouterr()
    assert captured.out == b"\xff\x00 line\r\nno end"
    assert captured.err == b""
    assert node.calls == [("GET", "/v1/logs/i-1?follow=1", None)]


def test_names_are_one_segment_of_a_path(node: Any, relume: Relume) -> None:
    for name, path in (("../../x", "..%2F..%2Fx"), ("a b?c=d", "a%20b%3Fc%3Dd"), ("..", "%2E%2E")):
        relume("logs", name)
        assert node.calls.pop()[1] == f"/v1/logs/{path}"


def test_apps(node: Any, relume: Relume) -> None:
    assert relume("apps", "ls").out.splitlines()[1].split() == ["hello", "b-1", "1"]
    assert relume("apps", "rm", "hello", "-o", "json").json == {"app": "hello", "removed": True}
    assert relume("apps", "rm", "hello").out == "✓ hello is removed\n"


def test_checkpoints(node: Any, relume: Relume) -> None:
    row = relume("checkpoints", "ls").out.splitlines()[1]
    assert "local, remote" in row
    assert "1.5 GB" in row
    assert relume("checkpoints", "ls", "-o", "json").json[0]["where"] == ["local", "remote"]
    shown = relume("checkpoints", "inspect", "cp-1").out
    assert "python3 (pid 1) 5 MB" in shown
    assert "[heap] (pid 1) 4 MB" in shown
    assert "region_shared_percent  95.0" in shown
    assert relume("checkpoints", "inspect", "cp-1", "-o", "json").json["processes"][0]["pid"] == 1
    assert relume("checkpoints", "verify", "cp-1").status == 0
    assert relume("checkpoints", "rm", "cp-1").status == 0
    assert "5 MB" in relume("checkpoints", "explain", "i-1").out
    node.answers["POST /v1/checkpoints/cp-1/verify"] = lambda _: {"checkpoint_id": "cp-1", "ok": False}
    assert relume("checkpoints", "verify", "cp-1").status == 1


def test_secrets(node: Any, relume: Relume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = tmp_path / "stdin"
    given.write_text("of two words\n")
    with given.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        ran = relume("secrets", "set", "hello", "A=1=2", "B")
        assert ran.status == 0
        assert node.calls == [("PUT", "/v1/secrets/hello", {"A": "1=2", "B": "of two words"})]
        assert "of two words" not in ran.out + ran.err
        assert relume("secrets", "set", "hello", "C").status == 2  # nothing left to read
    assert relume("secrets", "list", "hello").out == "A\nB\n"
    assert relume("secrets", "rm", "hello", "A").status == 0
    assert node.calls[-1] == ("DELETE", "/v1/secrets/hello?key=A", None)
    assert relume("secrets", "set", "hello").status == 2


def test_node_status(node: Any, relume: Relume) -> None:
    ran = relume("node", "status")
    assert (ran.status, ran.out.split()) == (0, ["node_id", "n-1", "instances", "1"])


class _App(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._say(200 if self.path == "/" else 404, f"{self.command} {self.path}".encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.headers["Content-Type"].encode()
        self._say(200, b'{"got": %s, "type": "%s", "path": "%s"}' % (body, kind, self.path.encode()))

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def app(node: Any) -> Iterator[None]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _App) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        rows = [
            {"instance_id": "i-0", "app": "hello", "state": "exited", "url": None},
            {"instance_id": "i-1", "app": "hello", "state": "ready", "url": url},
            {"instance_id": "i-2", "app": "other", "state": "starting", "url": url},
        ]
        node.answers["GET /v1/instances"] = lambda _: rows
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("app")
def test_call(relume: Relume) -> None:
    ran = relume("call", "hello")
    assert (ran.status, ran.out) == (0, "GET /")
    assert ran.err.startswith("  HTTP 200 in ")
    ran = relume("call", "i-1", "run?a=ä b", "--data", '{"x": [1]}', "-o", "json")
    assert ran.json["body"] == {"got": {"x": [1]}, "type": "application/json", "path": "/run?a=%C3%A4%20b"}
    assert ran.json["status"] == 200


@pytest.mark.usefixtures("app")
def test_call_data_from_a_file(relume: Relume, tmp_path: Path) -> None:
    (tmp_path / "body").write_text("[1, 2]")
    assert '"got": [1, 2]' in relume("call", "hello", "/", "-d", f"@{tmp_path}/body").out
    assert relume("call", "hello", "/", "-d", f"@{tmp_path}/missing").status == 2


@pytest.mark.usefixtures("app")
def test_call_failures(relume: Relume) -> None:
    ran = relume("call", "hello", "/nothing")
    assert (ran.status, ran.out) == (1, "GET /nothing")
    assert "✗ hello answered HTTP 404" in ran.err
    error = relume("call", "hello", "/nothing", "-o", "json").json["error"]
    assert (error["code"], error["status"], error["body"]) == ("call_failed", 404, "GET /nothing")
    error = relume("call", "other", "-o", "json").json["error"]
    assert error["code"] == "not_found"
    assert "starting" in error["message"]
    assert relume("call", "nobody").status == 4
    assert relume("call", "hello", "/", "--data", "{").status == 2


def test_call_of_a_port_that_nobody_has(node: Any, relume: Relume) -> None:
    error = relume("call", "hello", "-o", "json").json["error"]
    assert error["code"] == "call_failed"
    assert error["hint"] == "relume logs hello"


def test_a_name_that_is_no_utf8(node: Any, relume: Relume) -> None:
    """It comes through whole as JSON, and stops nobody who reads."""
    name = os.fsdecode(b"/tmp/caf\xe9")
    found = {"checkpoint_id": "cp-1", "app": "hello", "left_behind": {"count": 1, "names": [name]}}
    node.answers["GET /v1/checkpoints/cp-1"] = lambda _: found
    assert relume("checkpoints", "inspect", "cp-1", "-o", "json").json["left_behind"]["names"] == [name]
    ran = relume("checkpoints", "inspect", "cp-1")
    assert (ran.status, "/tmp/caf" in ran.out) == (0, True)
