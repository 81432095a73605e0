"""The words between node and keeper: JSON, one message a line, on the keeper's unix socket.

The node sends ``{"seq": n, "op": name, ...}`` and gets ``{"seq": n, "ok": {...}}`` or
``{"seq": n, "error": {...}}``; the keeper sends ``{"event": name, ...}`` in between. Only the newest
connection gets events; after a reconnect ``hello`` tells everything that was missed.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

LINE_LIMIT = 16 * 1024 * 1024


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, or None at the end of the connection; half a message or nonsense is an end, too."""
    try:
        line = await reader.readline()
        message = json.loads(line) if line.endswith(b"\n") else None
    except (ConnectionError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Queue ``message``; a peer that is gone is noticed by whoever reads."""
    if not writer.is_closing():
        writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
