"""What supervisord says of itself, by its unix socket, and what its other program keeps."""

import json
import secrets
import subprocess
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

REDIS = ["redis-cli", "-s", "/run/redis.sock"]


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


while True:
    try:
        said(*REDIS, "set", "token", secrets.token_hex(16))
        break
    except subprocess.CalledProcessError:  # it is just being started
        time.sleep(0.1)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            status = said("supervisorctl", "-c", "supervisord.conf", "status")
            answer = {"running": status.count("RUNNING"), "token": said(*REDIS, "get", "token").strip()}
            if self.path == "/restart":
                answer["restarted"] = said("supervisorctl", "-c", "supervisord.conf", "restart", "redis")
            code, body = 200, json.dumps(answer).encode()
        except subprocess.CalledProcessError as error:
            code, body = 500, (error.stdout + error.stderr).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


HTTPServer(("", 8000), Handler).serve_forever()
