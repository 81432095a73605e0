"""Arrow: a table in memory, its thread pool, and a file mapped into memory."""

import json
import secrets
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.compute as pc

import relume

token = secrets.token_hex(16)
rows = 2_000_000
table = pa.table({"n": pa.array(range(rows)), "group": pa.array([n % 7 for n in range(rows)])})
path = tempfile.mkdtemp() + "/table.arrow"
with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table)
mapped = pa.ipc.open_file(pa.memory_map(path)).read_all()
assert pc.sum(mapped["n"]).as_py() == rows * (rows - 1) // 2
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        groups = table.group_by("group").aggregate([("n", "sum")]).sort_by("group")["n_sum"].to_pylist()
        answer = {"token": token, "groups": groups, "mapped": pc.sum(mapped["n"]).as_py(), "rows": rows}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
