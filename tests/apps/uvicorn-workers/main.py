"""A plain ASGI app for uvicorn[standard] (uvloop, httptools) with two worker processes."""

import asyncio
import json
import os
import secrets
from pathlib import Path

TOKEN = secrets.token_hex(16)
READY = Path("/tmp/ready")
state = {"ticks": 0}


async def tick():
    while True:
        await asyncio.sleep(0.02)
        state["ticks"] += 1


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        state["task"] = asyncio.create_task(tick())
        READY.mkdir(exist_ok=True)
        # Kept open, so that a copy has the file too.
        state["marker"] = (READY / TOKEN).open("w")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        return
    both = scope["path"] != "/ready" or len(list(READY.iterdir())) == 2
    body = json.dumps({"token": TOKEN, "pid": os.getpid(), "ticks": state["ticks"]}).encode()
    await send({"type": "http.response.start", "status": 200 if both else 503, "headers": []})
    await send({"type": "http.response.body", "body": body})
