"""A model server whose start is worth saving: weights, compilation, warm-up, and then a checkpoint.

    GET  /health     200 once requests can be answered
    POST /generate   {"prompt": "...", "tokens": N} -> {"tokens": [...], "text": "..."}

Only the standard library and JAX.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from model import Generator

PORT = int(os.environ.get("PORT", "8000"))


def request_checkpoint() -> None:
    """Saves this process's memory for later starts. In a copy started from it, this returns again."""
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    try:
        with urllib.request.urlopen(request) as response:
            print("checkpoint:", json.loads(response.read()), flush=True)
    except http.client.RemoteDisconnected:
        print("started from the checkpoint", flush=True)
    except urllib.error.URLError as error:
        print("no checkpoint:", error.reason, flush=True)  # not on relume: serve all the same


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    generator: Generator
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {"status": "ok"})
        else:
            self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        if self.path != "/generate" or length > 65536:
            self.close_connection = True
            self.answer(404 if length <= 65536 else 413, {"error": "POST /generate with a small JSON body"})
            return
        try:
            asked = json.loads(self.rfile.read(length))
            with self.lock:
                tokens = self.generator.generate(str(asked["prompt"]), int(asked.get("tokens", 16)))
        except (ValueError, KeyError, TypeError) as error:
            self.answer(400, {"error": str(error)})
            return
        self.answer(200, {"tokens": tokens, "text": bytes(tokens).decode("latin-1")})

    def answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    started = time.monotonic()
    Handler.generator = Generator(seed=20)
    print(f"weights made in {time.monotonic() - started:.1f} s", flush=True)
    Handler.generator.warm_up()
    print(f"compiled and warm after {time.monotonic() - started:.1f} s", flush=True)
    request_checkpoint()
    ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()


if __name__ == "__main__":
    main()
