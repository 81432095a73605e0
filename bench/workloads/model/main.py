"""A model server on JAX: 24 layers of 64 MiB, of which an answer uses 6, as a mixture of experts does.

Its cold start is real work: importing JAX, making 1.6 GB of weights, compiling.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = 24
WIDTH = 4096
USED = range(0, LAYERS, 4)


def make_weights() -> list[jax.Array]:
    """Float32, so 64 MiB a layer; scaled so that activations keep their size."""
    generator = np.random.default_rng(20)
    scale = np.float32(WIDTH**-0.5)
    return [
        jnp.asarray(generator.standard_normal((WIDTH, WIDTH), dtype=np.float32) * scale)
        for _ in range(LAYERS)
    ]


@jax.jit
def layer(weights: jax.Array, state: jax.Array) -> jax.Array:
    return jnp.tanh(weights @ state) + state


def answer(weights: list[jax.Array]) -> dict[str, object]:
    state = jnp.linspace(-1, 1, WIDTH, dtype=jnp.float32)
    for index in USED:
        state = layer(weights[index], state)
    return {"best": int(jnp.argmax(state)), "mean": round(float(jnp.mean(state)), 4)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    weights: list[jax.Array]
    lock = threading.Lock()

    def do_GET(self) -> None:
        with self.lock:
            body = json.dumps(answer(self.weights)).encode()
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
    Handler.weights = make_weights()
    answer(Handler.weights)
    server = ThreadingHTTPServer(("0.0.0.0", 8000), Handler)
    request_checkpoint()
    server.serve_forever()
