"""DuckDB with its database file held open, uncommitted work in the log beside it, and a table in memory only."""

import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import duckdb

import relume

connection = duckdb.connect("/tmp/app.duckdb")
connection.execute("CREATE TABLE numbers AS SELECT range AS n FROM range(1000000)")
connection.execute("CREATE TEMP TABLE memory AS SELECT ? AS token", [secrets.token_hex(16)])
connection.execute("CREATE TABLE visits (n INTEGER)")
lock = threading.Lock()
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        with lock:
            connection.execute("INSERT INTO visits VALUES (1)")
            connection.execute("CHECKPOINT")
            total = connection.execute("SELECT sum(n)::BIGINT FROM numbers").fetchone()[0]
            visits = connection.execute("SELECT count(*) FROM visits").fetchone()[0]
            token = connection.execute("SELECT token FROM memory").fetchone()[0]
        body = json.dumps({"token": token, "total": total, "visits": visits}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
