"""`relume call`: one HTTP request to a running instance of an app."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient
from relume.cli.render import Screen, duration
from relume.errors import BadRequest, CallFailed, NotFound

_CHUNK = 64 * 1024


def configure(parser: Parser) -> None:
    parser.add_argument("app", metavar="APP", help="the app's name, or an instance")
    parser.add_argument("path", metavar="PATH", nargs="?", default="/", help="what to ask for (default: /)")
    parser.add_argument("-d", "--data", metavar="JSON", help="a body to POST; @FILE reads it from a file")
    parser.add_argument("-X", "--method", default="", help="by default GET, and POST with --data")
    parser.runs(call)


def call(options: Namespace) -> None:
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import quote

    screen = Screen(options.output)
    body = None if options.data is None else _body(options.data)
    url = _ready_url(options.app)
    method = options.method.upper() or ("GET" if body is None else "POST")
    target = quote(f"/{options.path.removeprefix('/')}", safe="/?&=:%+,;@~!$'()*[]")
    hint = f"relume logs {options.app}"
    began = time.monotonic()
    connection = HTTPConnection(url.removeprefix("http://").rstrip("/"))
    try:
        connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        if screen.as_json:
            whole = answer.read()
        else:
            while chunk := answer.read1(_CHUNK):
                screen.raw(chunk)
    except BrokenPipeError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        what = str(error) or type(error).__name__
        raise CallFailed(f"{options.app} at {url} did not answer: {what}", hint=hint) from None
    finally:
        connection.close()
    seconds = time.monotonic() - began
    shown = {"body": _parsed(whole)} if screen.as_json else {}
    if answer.status >= 400:
        message = f"{options.app} answered HTTP {answer.status}"
        raise CallFailed(message, hint=hint, status=answer.status, **shown)
    if screen.as_json:
        screen.data({"status": answer.status, "seconds": round(seconds, 6), **shown})
    else:
        screen.hint(f"HTTP {answer.status} in {duration(seconds)}")


def _body(data: str) -> bytes:
    if data.startswith("@"):
        try:
            return Path(data[1:]).read_bytes()
        except (OSError, ValueError) as error:
            raise BadRequest(f"--data: {error}", hint="@FILE names a file that can be read") from None
    try:
        json.loads(data)
    except ValueError as error:
        example = """for example --data '{"prompt": "hello"}'"""
        raise BadRequest(f"--data is not JSON: {error}", hint=example) from None
    return data.encode()


def _ready_url(app: str) -> str:
    instances: list[dict[str, Any]] = NodeClient().get("/v1/instances")
    of_app = [item for item in instances if app in (item["app"], item["instance_id"])]
    ready = [item for item in of_app if item["state"] == "ready" and item.get("url")]
    if not ready:
        states = ", ".join(sorted({str(item["state"]) for item in of_app})) or "none"
        raise NotFound(f"no instance of {app} is ready (there are: {states})", hint=f"relume start {app}")
    return str(ready[-1]["url"])


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode("utf-8", "replace")
