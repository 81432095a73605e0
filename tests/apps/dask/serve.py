"""A Dask cluster of processes: scheduler, nannies and workers, all over TCP inside the container."""

import json
import secrets
from http.server import BaseHTTPRequestHandler, HTTPServer

from distributed import Client, LocalCluster

import relume


def square(n):
    return n * n


def main():
    token = secrets.token_hex(16)
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    client = Client(cluster)
    [kept] = client.scatter([list(range(100_000))], broadcast=True)
    assert client.submit(sum, kept).result() == 4_999_950_000
    print(relume.checkpoint())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer = {
                "token": token,
                "kept": client.submit(sum, kept, pure=False).result(30),
                "squares": sum(client.gather(client.map(square, range(100), pure=False))),
                "workers": len(client.scheduler_info()["workers"]),
            }
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()


if __name__ == "__main__":
    main()
