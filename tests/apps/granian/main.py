"""An ASGI app behind granian, whose HTTP server is Rust (tokio, hyper)."""

import asyncio
import os
import pathlib
import secrets
import time

# The workers are spawned; what they share was made by the first of them.
shared = pathlib.Path(f"/dev/shm/token-of-{os.getppid()}")
try:
    with shared.open("x") as file:
        file.write(secrets.token_hex(16))
except FileExistsError:
    time.sleep(0.2)
token = shared.read_text()
ticks = 0


async def tick():
    global ticks
    while True:
        await asyncio.sleep(0.02)
        ticks += 1


ticking = None


async def app(scope, receive, send):
    global ticking
    if scope["type"] != "http":
        return
    ticking = ticking or asyncio.ensure_future(tick())
    body = f'{{"token": "{token}", "ticks": {ticks}, "pid": {os.getpid()}}}'.encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}
    )
    await send({"type": "http.response.body", "body": body})
