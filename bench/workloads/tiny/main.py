"""The smallest server there is: what a start costs when the app costs nothing."""

from __future__ import annotations

import http.client
import json
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"answer": 42}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def request_checkpoint() -> None:
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            print(response.read().decode(), flush=True)
    except http.client.RemoteDisconnected:
        pass  # a copy


if __name__ == "__main__":
    server = HTTPServer(("0.0.0.0", 8000), Handler)
    request_checkpoint()
    server.serve_forever()
