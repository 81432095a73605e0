"""Asks for a checkpoint by the client that CLIENT names, and tells how the request ended and after how long."""

import asyncio
import json
import os
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import aiohttp
import httpx
import requests

URL = "http://169.254.169.253:8234/checkpoint"
FETCH = f"""fetch("{URL}", {{method: "POST"}}).then(async (answer) => console.log(await answer.text()))
.catch((error) => {{ console.error(error.name, error.cause?.code); process.exit(7); }})"""


def by_urllib():
    return urllib.request.urlopen(urllib.request.Request(URL, method="POST"), timeout=300).read()


def by_requests():
    return requests.post(URL, timeout=300).text


def by_requests_kept_alive():
    with requests.Session() as session:
        session.get("http://169.254.169.253:8234/status", timeout=10)
        return session.post(URL, timeout=300).text


def by_httpx():
    return httpx.post(URL, timeout=300).text


def by_httpx_async():
    async def post():
        async with httpx.AsyncClient(timeout=300) as client:
            return (await client.post(URL)).text

    return asyncio.run(post())


def by_aiohttp():
    async def post():
        async with aiohttp.ClientSession() as session, session.post(URL) as answer:
            return await answer.text()

    return asyncio.run(post())


def by_curl():
    return command("curl", "-sS", "--max-time", "300", "-X", "POST", URL)


def by_node_fetch():
    return command("node", "-e", FETCH)


def command(*argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


#: A thread whose clock goes on in a copy from where it stood: the last time before the freeze, and the first after.
gaps = []


def watch_the_clock():
    while True:
        wall, monotonic = time.time(), time.monotonic()
        if gaps and abs(wall - monotonic - gaps[-1][0]) < 0.02:
            gaps[-1] = (wall - monotonic, gaps[-1][1])
        else:
            gaps.append((wall - monotonic, monotonic))
        time.sleep(0.005)


result = {}


def ask():
    try:
        result["answer"] = json.loads(globals()[f"by_{os.environ['CLIENT']}"]())
    except Exception as error:
        result["error"] = f"{type(error).__module__}.{type(error).__qualname__}: {error}"
    result["ended_after_s"] = time.monotonic() - gaps[-1][1]
    print(json.dumps(result.get("answer", result)), flush=True)


threading.Thread(target=watch_the_clock, daemon=True).start()
time.sleep(0.1)
threading.Thread(target=ask, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(result).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
