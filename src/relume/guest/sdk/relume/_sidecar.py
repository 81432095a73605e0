"""The instance's own HTTP endpoint, called directly.

``http.client`` and never ``urllib``: it reads no proxy variables, so an ``http_proxy`` of the app's cannot
send these calls away. A connection per call: one that was open at a checkpoint is dead in the copy.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

#: Where every instance finds its sidecar. Link-local, on the loopback interface of the instance.
ADDRESS = ("169.254.169.253", 8234)

#: Seconds for which ``status`` tries again.
PATIENCE = 5.0


class NoAnswer(Exception):
    """The call ended without an answer that makes sense: refused, cut, timed out, or no JSON object."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


def present() -> bool:
    """Whether the sidecar's address is one of this machine's own, as it is in a relume instance only.

    Asking the kernel to bind to it answers at once. Connecting would not: elsewhere the packets go to the
    default route, where nothing may ever answer them (some clouds have a resolver at this address).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((ADDRESS[0], 0))
        except OSError:
            return False
    return True


def call(method: str, path: str, timeout: float) -> dict[str, Any]:
    """One request; the JSON object of a 200 answer.

    ``timeout`` is in seconds, for each step on the socket. Raises NoAnswer.
    """
    connection = http.client.HTTPConnection(ADDRESS[0], ADDRESS[1], timeout=timeout)
    try:
        connection.request(method, path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
    except socket.timeout as error:  # noqa: UP041 - not a TimeoutError before Python 3.10
        raise NoAnswer(f"{method} {path}: no answer within {timeout:g} s", timed_out=True) from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{method} {path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise NoAnswer(f"{method} {path}: HTTP {response.status}: {body[:200]!r}")
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise NoAnswer(f"{method} {path}: the answer is no JSON: {body[:200]!r}") from error
    if not isinstance(answer, dict):
        raise NoAnswer(f"{method} {path}: the answer is no JSON object: {body[:200]!r}")
    return answer


def status() -> dict[str, Any]:
    """``GET /status``, tried again for a while: just after a restore the listener may be a moment late.
    Raises NoAnswer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call("GET", "/status", timeout=2.0)
        except NoAnswer:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)


def restore_id() -> str | None:
    """The id of the restore this process came from: another one in every copy. None in a container that was
    booted, and outside relume."""
    if not present():
        return None
    try:
        found = status()
    except NoAnswer:
        return None
    return str(found["restore_id"]) if found.get("restored") else None
