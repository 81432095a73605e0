"""A preforked server: 256 MiB made once and shared by four workers; an answer reads 32 MiB of it."""

from __future__ import annotations

import http.client
import json
import mmap
import os
import random
import time
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

HELD = 256 << 20
TOUCHED = 32 << 20
WORKERS = 4
_STEP = 1 << 20


def hold() -> mmap.mmap:
    memory = mmap.mmap(-1, HELD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    noise = random.Random(20).randbytes(_STEP)
    for at in range(0, HELD, _STEP):
        memory[at : at + _STEP] = noise
        memory[at : at + 8] = at.to_bytes(8, "little")
    return memory


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    memory: mmap.mmap

    def do_GET(self) -> None:
        with memoryview(self.memory) as whole, whole[:TOUCHED] as part:
            body = json.dumps({"checksum": zlib.crc32(part)}).encode()
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
    Handler.memory = hold()
    server = HTTPServer(("0.0.0.0", 8000), Handler)
    for _ in range(WORKERS):
        if os.fork() == 0:
            server.serve_forever()
    time.sleep(0.2)  # the workers are in their accept() by then
    request_checkpoint()
    os.wait()
