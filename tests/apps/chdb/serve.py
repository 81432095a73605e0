"""ClickHouse in the process (chdb), with a table on disk; its threads hold files about themselves in /proc."""

import json
import secrets
from http.server import BaseHTTPRequestHandler, HTTPServer

from chdb.session import Session

import relume

token = secrets.token_hex(16)
session = Session("/var/lib/tables")
session.query("CREATE DATABASE d")
session.query("CREATE TABLE d.t (n UInt64) ENGINE = MergeTree ORDER BY n")
session.query("INSERT INTO d.t SELECT number FROM numbers(100000)")
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        session.query("INSERT INTO d.t VALUES (1000000)")
        count, total = map(int, str(session.query("SELECT count(), sum(n) FROM d.t", "CSV")).split(","))
        body = json.dumps({"token": token, "count": count, "total": total}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


HTTPServer(("", 8000), Handler).serve_forever()
