"""Holds 8 GiB, of which every answer reads the same 64 MiB: does a start cost what is held, or what is used?"""

from __future__ import annotations

import http.client
import json
import mmap
import random
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

HELD = 8 << 30
TOUCHED = 64 << 20
PIECES = 16
_STEP = 1 << 20


def hold() -> mmap.mmap:
    """Private memory without a zero page: a random MiB, repeated, its first bytes saying which."""
    memory = mmap.mmap(-1, HELD, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    noise = random.Random(20).randbytes(_STEP)
    for at in range(0, HELD, _STEP):
        memory[at : at + _STEP] = noise
        memory[at : at + 8] = at.to_bytes(8, "little")
    return memory


def touch(memory: mmap.mmap) -> int:
    """A checksum of 16 pieces of 4 MiB, evenly spread."""
    checksum = 0
    whole = memoryview(memory)
    for piece in range(PIECES):
        at = piece * (HELD // PIECES)
        checksum = zlib.crc32(whole[at : at + TOUCHED // PIECES], checksum)
    whole.release()
    return checksum


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    memory: mmap.mmap

    def do_GET(self) -> None:
        body = json.dumps({"checksum": touch(self.memory)}).encode()
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
    request_checkpoint()
    server.serve_forever()
