"""JAX on CPU: a function compiled before the checkpoint."""

import json
import secrets
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import jax.numpy as jnp

import relume

token = secrets.token_hex(16)
weights = [jax.random.normal(jax.random.key(n), (512, 512)) / 512**0.5 for n in range(24)]
compiled = 0


@jax.jit
def forward(x):
    global compiled
    compiled += 1  # runs while tracing only
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return x.sum()


expected = float(forward(jnp.ones(512)))
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        began = time.perf_counter()
        same = float(forward(jnp.ones(512))) == expected
        answer = {
            "token": token,
            "same": same,
            "compiled": compiled,
            "ms": (time.perf_counter() - began) * 1000,
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
