"""A WSGI app whose data is loaded once, by the master, before it forks its workers."""

import json
import os
import secrets

TOKEN = secrets.token_hex(16)
TABLE = {n: str(n) * 20 for n in range(300_000)}


def app(environ, start_response):
    body = json.dumps({"token": TOKEN, "rows": len(TABLE), "uid": os.getuid(), "last": TABLE[299_999]})
    start_response("200 OK", [("Content-Type", "application/json")])
    return [body.encode()]
