"""`relume init NAME`: a small app that works as it is, with a checkpoint in it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from relume.cli.arguments import Parser
from relume.cli.render import Screen
from relume.errors import Conflict

_TOML = """\
[cerebrium.deployment]
name = "{name}"
python_version = "3.11"
include = ["./*", "main.py", "cerebrium.toml"]
exclude = [".*"]

[cerebrium.runtime.custom]
entrypoint = ["python3", "main.py"]
port = 8000
readycheck_endpoint = "/ready"

[cerebrium.hardware]
compute = "CPU"
cpu = 1.0
memory = 1.0

[cerebrium.experimental]
checkpointing = true
"""

_MAIN = '''\
"""A server that does its slow start once: later instances begin where the checkpoint was taken."""

import http.client
import http.server
import json
import time
import urllib.request

CHECKPOINT = "http://169.254.169.253:8234/checkpoint"


def load_model():
    time.sleep(3)  # your imports, weights and warm-up
    return {"loaded_at": time.time()}


def checkpoint():
    """Save this process. The original gets an answer; a restored copy sees the connection end."""
    try:
        with urllib.request.urlopen(urllib.request.Request(CHECKPOINT, method="POST")) as answer:
            print("checkpoint:", answer.read().decode(), flush=True)
    except http.client.RemoteDisconnected:
        print("restored", flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"path": self.path, **MODEL}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


MODEL = load_model()
checkpoint()
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
'''


def configure(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the app's name")
    parser.add_argument("--dir", metavar="DIR", type=Path, help="where to make it (default: ./NAME)")
    parser.runs(init)


def init(options: Namespace) -> None:
    from relume.config import FILE_NAME, require_app_name

    screen = Screen(options.output)
    require_app_name(options.name)
    target: Path = (options.dir or Path(options.name)).absolute()
    files = {FILE_NAME: _TOML.format(name=options.name), "main.py": _MAIN}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            with (target / file).open("x") as out:
                out.write(text)
            screen.done(f"Wrote {target / file}")
    except FileExistsError as error:
        raise Conflict(f"{error.filename} is there already", hint="choose another name or --dir") from None
    except (OSError, ValueError) as error:
        raise Conflict(f"{target}: {error}", hint="choose another place with --dir") from None
    screen.data({"app": options.name, "directory": str(target), "files": list(files)}, [str(target)])
    screen.hint(f"next: relume deploy {target}")
