"""Databases in files, held open in the middle of something: LMDB with a reader, DuckDB and SQLite in a transaction,
HDF5 in writing; and a folder that is watched."""

import json
import secrets
import sqlite3
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import diskcache
import duckdb
import h5py
import lmdb
import numpy
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

import relume

token = secrets.token_hex(16)
data = Path("/data")
(data / "watched/below").mkdir(parents=True)

environment = lmdb.open(str(data / "lmdb"), map_size=1 << 30)
with environment.begin(write=True) as transaction:
    for number in range(5000):
        transaction.put(b"key%d" % number, b"x" * 100)
reader = environment.begin()
duck = duckdb.connect(str(data / "app.duckdb"))
duck.execute("CREATE TABLE numbers AS SELECT range AS n FROM range(100000)")
duck.execute("BEGIN")
duck.execute("INSERT INTO numbers VALUES (-1)")
wal = sqlite3.connect(data / "wal.sqlite")
wal.execute("PRAGMA journal_mode = WAL")
rollback = sqlite3.connect(data / "rollback.sqlite")
for database in (wal, rollback):
    database.execute("CREATE TABLE numbers (n INTEGER)")
    database.commit()
    database.execute("INSERT INTO numbers VALUES (1)")
cache = diskcache.Cache(data / "cache")
cache["old"] = list(range(1000))
table = h5py.File(data / "table.h5", "w")
table["old"] = numpy.arange(1000)
named = tempfile.NamedTemporaryFile()
named.write(b"a name")
named.flush()

created = []
changed = threading.Event()


class Watch(FileSystemEventHandler):
    def on_created(self, event):
        created.append(event.src_path)
        changed.set()


observer = Observer()
observer.schedule(Watch(), str(data / "watched"), recursive=True)
observer.start()

result = relume.checkpoint()
print(result, flush=True)

OTHER = """
import lmdb
environment = lmdb.open("/data/lmdb", map_size=1 << 30)
with environment.begin(write=True) as transaction:
    transaction.put(b"other", b"another process")
"""


def look():
    assert reader.get(b"key7") == b"x" * 100
    with environment.begin(write=True) as transaction:
        transaction.put(b"new", b"this process")
    subprocess.run([sys.executable, "-c", OTHER], check=True)
    with environment.begin() as transaction:
        assert transaction.get(b"other") == b"another process"
        assert transaction.stat()["entries"] == 5002
    duck.execute("COMMIT")
    duck.execute("CHECKPOINT")
    assert duck.execute("SELECT count(*) FROM numbers").fetchone() == (100_001,)
    for database in (wal, rollback):
        database.execute("INSERT INTO numbers VALUES (2)")
        database.commit()
        assert database.execute("SELECT count(*) FROM numbers").fetchone() == (2,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    cache["new"] = 1
    assert (len(cache["old"]), cache["new"]) == (1000, 1)
    table["new"] = numpy.arange(10)
    table.flush()
    assert (int(table["old"][999]), list(table)) == (999, ["new", "old"])
    named.seek(0)
    assert named.read() == b"a name" and Path(named.name).exists()
    (data / "watched/below/file").touch()
    assert changed.wait(10) and created == ["/data/watched/below/file"]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        look()
        answer = {"token": token, "warnings": result.answer.get("warnings")}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
