"""Everything the SDK offers: hooks, one of which fails at first; requests from a thread, one after another."""

import json
import os
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import relume

token = secrets.token_hex(16)
results = []
hooks = []
busy = True


@relume.before_checkpoint
def refuse_while_busy():
    hooks.append("before")
    if busy:
        raise RuntimeError("work is still going on")


@relume.after_restore
def reconnect():
    hooks.append("after")
    relume.refresh_env()


def ask():
    result = relume.checkpoint()
    results.append([result.status, result.reason, result.restored, result.restore_id])


ask()
busy = False
for _ in range(2):
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answer = {"token": token, "results": results, "hooks": hooks, "env": os.environ.get("APP_GREETING")}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
