"""PostgreSQL under its own user, and an HTTP server with a session to it that outlives the checkpoint."""

import json
import secrets
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg2

import relume

PROGRAMS = next(Path("/usr/lib/postgresql").glob("*/bin"))
DATA = "/var/lib/postgresql/app"


def as_postgres(*command: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [str(PROGRAMS / command[0]), *command[1:]], user="postgres", group="postgres", cwd="/tmp"
    )


def connect() -> "psycopg2.extensions.connection":
    for _ in range(200):
        try:
            return psycopg2.connect(host="/tmp", user="postgres", dbname="postgres")
        except psycopg2.OperationalError:
            time.sleep(0.1)
    raise SystemExit("PostgreSQL does not come up")


as_postgres("initdb", "-D", DATA, "-A", "trust", "--locale=C", "-E", "UTF8", "--no-sync").wait()
as_postgres("postgres", "-D", DATA, "-k", "/tmp", "-c", "listen_addresses=")
session = connect()
session.autocommit = True
lock = threading.Lock()
with session.cursor() as cursor:
    cursor.execute("CREATE TABLE visits (at timestamptz DEFAULT now())")
    cursor.execute("CREATE TEMP TABLE memory AS SELECT %s AS token", [secrets.token_hex(16)])
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with lock, session.cursor() as cursor:
            cursor.execute("INSERT INTO visits DEFAULT VALUES")
            cursor.execute("SELECT token, (SELECT count(*) FROM visits) FROM memory")
            token, visits = cursor.fetchone()
        # A second session: a new server process, and files opened by name.
        with connect() as other, other.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM visits")
            seen = cursor.fetchone()[0]
        body = json.dumps({"token": token, "visits": visits, "seen": seen}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
