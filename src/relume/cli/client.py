"""The node's API over its unix socket, as the commands see it.

Guarantees: every failure is a RelumeError. What the node answers as an error is raised as the class of that code
(with its exit status), so a command reads the same as if it had called the node's code itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from relume import errors
from relume.cli.http10 import Answer, ConnectionLost, request
from relume.errors import NodeUnreachable, RelumeError

DEFAULT_STATE = Path("/var/lib/relume")


def state_directory() -> Path:
    """``$RELUME_STATE``, or where a node of the package keeps its state."""
    return Path(os.environ.get("RELUME_STATE") or DEFAULT_STATE).absolute()


def segment(text: str) -> str:
    """A user's word as one segment of an API path, or as a query's value."""
    if text.isascii() and text.replace("-", "a").replace("_", "a").isalnum():
        return text
    from urllib.parse import quote  # 2 ms that a plain name need not pay

    return quote(text, safe="") if text not in (".", "..") else text.replace(".", "%2E")


class NodeClient:
    """Requests to the node whose state is in ``state``."""

    def __init__(self, state: Path | None = None) -> None:
        self.socket_path = (state or state_directory()) / "node.sock"

    def get(self, path: str) -> Any:
        return self._json("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        return self._json("POST", path, body)

    def put(self, path: str, body: Any) -> Any:
        return self._json("PUT", path, body)

    def delete(self, path: str) -> Any:
        return self._json("DELETE", path)

    def stream(self, path: str, body: Any, progress: Callable[[str], None]) -> Any:
        """POST, hand each line of progress on, and return the result."""
        lines = self._send("POST", path, body)
        try:
            for line in _lines(lines):
                event = json.loads(line)
                if "progress" in event:
                    progress(str(event["progress"]))
                elif "error" in event:
                    raise error_of(event["error"])
                elif "result" in event:
                    return event["result"]
        except (ConnectionLost, ValueError) as error:
            raise self._went_away() from error
        raise self._went_away()

    def raw(self, path: str) -> Iterator[bytes]:
        """The bytes of an answer as they come. A connection that ends early just ends."""
        answer = self._send("GET", path, None)
        try:
            yield from answer
        except ConnectionLost as error:
            raise self._went_away() from error

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        answer = self._send(method, path, body)
        try:
            raw = b"".join(answer)
            return json.loads(raw) if raw.strip() else None
        except (ConnectionLost, ValueError) as error:
            raise self._went_away() from error

    def _send(self, method: str, path: str, body: Any) -> Answer:
        raw = None if body is None else json.dumps(body).encode()
        try:
            answer = request(self.socket_path, method, path, raw)
        except PermissionError:
            raise NodeUnreachable(
                f"no permission for {self.socket_path}", hint="run the command as the node's user (root)"
            ) from None
        except OSError as error:
            raise NodeUnreachable(
                f"no node answers on {self.socket_path}: {error.strerror or error}",
                hint="start one: `relume node run` as root, with the same RELUME_STATE",
            ) from None
        except ConnectionLost as error:
            raise self._went_away() from error
        if answer.status >= 400:
            raise self._refusal(answer)
        return answer

    def _refusal(self, answer: Answer) -> RelumeError:
        try:
            body = json.loads(b"".join(answer))
            return error_of(body["error"])
        except (ConnectionLost, ValueError, KeyError, TypeError):
            return NodeUnreachable(
                f"the node answered {answer.status} and no reason",
                hint="is it of the same version? `relume node status`",
            )

    def _went_away(self) -> NodeUnreachable:
        return NodeUnreachable(
            f"the node on {self.socket_path} went away before it had answered",
            hint="look at its log, start it again if it ended, then `relume ps`: instances live on without it",
        )


def _lines(answer: Answer) -> Iterator[bytes]:
    rest = b""
    for chunk in answer:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest


def error_of(body: dict[str, Any]) -> RelumeError:
    """The error object of the API as the exception it was raised as."""
    code = str(body.get("code", RelumeError.code))
    kind: type[RelumeError] = _classes().get(code) or type("NodeError", (RelumeError,), {"code": code})
    details = {name: value for name, value in body.items() if name not in ("code", "message", "hint")}
    return kind(str(body.get("message", "")), hint=str(body.get("hint") or ""), **details)


def _classes() -> dict[str, type[RelumeError]]:
    found = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RelumeError)
    ]
    return {kind.code: kind for kind in found}
