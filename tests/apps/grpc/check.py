"""gRPC: a server, and a channel inside the container that was open at the checkpoint."""

from __future__ import annotations

import grpc
from ask import Ask

TITLE = "grpcio, server and inner channel"
FAST = False


def check(app: Ask) -> object:
    with grpc.insecure_channel(f"{app.host}:{app.port}") as channel:
        ask = channel.unary_unary("/Outer/Ask")
        token, calls, text = ask(b"hello", timeout=30).decode().split()
    assert (calls, text) == ("2", "hello"), "counts on from the one warm-up call"
    return token
