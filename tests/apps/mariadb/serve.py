"""MariaDB, as another user than root, asked by its own client; a table on disk and one in memory."""

import json
import secrets
import subprocess
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import relume


def sql(statements):
    done = subprocess.run(
        ["mariadb", "-N", "-e", statements], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()


subprocess.run(["install", "-d", "-o", "mysql", "/run/mysqld"], check=True)
server = subprocess.Popen(["mariadbd", "--user=mysql"])
while True:
    try:
        sql("SELECT 1")
        break
    except subprocess.CalledProcessError:
        assert server.poll() is None, "it does not start"
        time.sleep(0.1)
token = secrets.token_hex(16)
sql(
    "CREATE DATABASE d; CREATE TABLE d.t (n INT PRIMARY KEY AUTO_INCREMENT, x VARCHAR(50)) ENGINE=InnoDB;"
    "CREATE TABLE d.m (x VARCHAR(50)) ENGINE=MEMORY;"
    f"INSERT INTO d.t (x) VALUES ('first'); INSERT INTO d.m VALUES ('{token}')"
)
print(relume.checkpoint())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        sql("INSERT INTO d.t (x) VALUES ('more')")
        token, rows, first = sql("SELECT x FROM d.m; SELECT COUNT(*) FROM d.t; SELECT x FROM d.t WHERE n = 1")
        body = json.dumps({"token": token, "rows": int(rows), "first": first}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


HTTPServer(("", 8000), Handler).serve_forever()
