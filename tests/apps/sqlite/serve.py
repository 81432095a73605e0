"""SQLite in WAL mode, with one connection that stays open across the checkpoint. (A second connection opened in a
copy by the same process is the trap that docs/limitations.md tells of.)"""

import json
import secrets
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import relume

database = sqlite3.connect("/tmp/app.sqlite", check_same_thread=False)
database.execute("PRAGMA journal_mode = WAL")
database.execute("CREATE TABLE rows (n INTEGER, text TEXT)")
with database:
    database.executemany("INSERT INTO rows VALUES (?, ?)", ((n, "x" * 100) for n in range(20_000)))
database.execute("CREATE TEMP TABLE memory AS SELECT ? AS token", [secrets.token_hex(16)])
lock = threading.Lock()
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        with lock, database:
            database.execute("INSERT INTO rows VALUES (-1, 'new')")
            new, total = database.execute("SELECT sum(n = -1), count(*) FROM rows").fetchone()
            (token,) = database.execute("SELECT token FROM memory").fetchone()
        (sound,) = database.execute("PRAGMA integrity_check").fetchone()
        body = json.dumps({"token": token, "new": new, "total": total, "sound": sound}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
