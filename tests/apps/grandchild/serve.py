"""A daemon's way: the request is made by a grandchild whose parent is gone, in a session of its own."""

import http.client
import json
import os
import secrets
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing import Value

token = secrets.token_hex(16)
told = Value("i", 0)

if os.fork() == 0:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
    try:
        req = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
        with urllib.request.urlopen(req, timeout=300) as response:
            print(response.read().decode(), flush=True)
        told.value = 1
    except http.client.RemoteDisconnected:
        told.value = 2
    os._exit(0)
os.wait()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"token": token, "told": told.value}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
