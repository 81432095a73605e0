"""Ray: its own control plane, raylet, object store in shared memory and workers, all inside the container."""

import json
import secrets
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import ray

import relume


@ray.remote
class Keeper:
    def __init__(self):
        self.token = secrets.token_hex(16)

    def get(self):
        return self.token


@ray.remote
def total(values):
    return int(values.sum())


def main():
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    keeper, stored = Keeper.remote(), ray.put(np.arange(1_000_000))
    assert ray.get(total.remote(stored)) == 499_999_500_000
    print(relume.checkpoint())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = {
                "token": ray.get(keeper.get.remote(), timeout=60),
                "total": ray.get(total.remote(stored), timeout=60),
                "new": ray.get(total.remote(ray.put(np.ones(1000, dtype=int))), timeout=60),
            }
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    HTTPServer(("", 8000), Handler).serve_forever()


if __name__ == "__main__":
    main()
