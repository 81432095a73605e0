"""The apps that are measured: where they lie, how much memory they need, and the question each is asked.

The apps themselves are directories, written like any user's (`bench/workloads/` in the source tree).
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from relume.errors import BadRequest, CallFailed

DIRECTORY = Path(__file__).resolve().parents[4] / "bench"

_PATIENCE = 300.0
"""Seconds for one answer; a cold one may still be making its weights."""


@dataclass(frozen=True, slots=True)
class Workload:
    """``memory_bytes`` is what one instance holds when all of it is there; ``ask`` gets (host, port).

    ``within`` is the folder of its app below ``bench/``.
    """

    name: str
    summary: str
    memory_bytes: int
    ask: Callable[[str, int], Any]
    within: str = "workloads"

    @property
    def directory(self) -> Path:
        """Its app. Raises BadRequest outside of a source tree."""
        found = DIRECTORY / self.within / self.name
        if not found.is_dir():
            raise BadRequest(
                f"{found} is not there", hint="the workloads come with the source tree: script/relume bench"
            )
        return found

    def answer(self, url: str) -> Any:
        """Ask the instance at ``url`` once. Raises CallFailed."""
        address = urlsplit(url)
        try:
            return self.ask(str(address.hostname), int(address.port or 80))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CallFailed(f"{self.name} did not answer: {error!r}", hint="its log says more") from error


def _http(host: str, port: int) -> Any:
    return _request(host, port, "GET", "/answer")


def _vllm(host: str, port: int) -> Any:
    """4 greedy tokens for a prompt of 8, from the function of its ``main.py``.

    Few, because a processor without bfloat16 takes half a second for each, which is no part of a start.
    """
    question = json.dumps({"prompt": list(range(1, 9)), "max_tokens": 4})
    return _request(host, port, "POST", "/generate", question)["result"]["tokens"]


def _request(host: str, port: int, method: str, path: str, body: str | None = None) -> Any:
    connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {answer[:200]!r}")
    return json.loads(answer)


def _redis(host: str, port: int) -> list[str]:
    """100 of the million keys, in one MGET (the RESP protocol, https://redis.io/docs/reference/protocol-spec)."""
    keys = " ".join(f"key:{number * 9999}" for number in range(100))
    with socket.create_connection((host, port), timeout=_PATIENCE) as connection:
        connection.sendall(f"MGET {keys}\r\n".encode())
        with connection.makefile("rb") as stream:
            values = [_bulk(stream.readline, stream.read) for _ in range(_length(stream.readline(), b"*"))]
    if len(values) != 100:
        raise ValueError(f"{len(values)} values for 100 keys")
    return values


def _bulk(readline: Callable[[], bytes], read: Callable[[int], bytes]) -> str:
    size = _length(readline(), b"$")
    return read(size + 2)[:-2].decode()


def _length(line: bytes, kind: bytes) -> int:
    if line[:1] != kind:
        raise ValueError(f"not what Redis answers: {line[:100]!r}")
    return int(line[1:])


_MIB = 1 << 20

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", "a server that does nothing", 32 * _MIB, _http),
        Workload("touch-2g", "2 GiB held, 64 MiB of it used", 2100 * _MIB, _http),
        Workload("touch-8g", "8 GiB held, the same 64 MiB used", 8300 * _MIB, _http),
        Workload("model", "JAX, 1.6 GB of weights, a quarter used", 1900 * _MIB, _http),
        Workload("python-web", "FastAPI, SQLAlchemy, uvicorn with uvloop", 128 * _MIB, _http),
        Workload("forks", "four workers that share 256 MiB by fork", 1400 * _MIB, _http),
        Workload("redis", "Redis with a million keys", 200 * _MIB, _redis),
        Workload("torch-gpu", "3.4 billion weights on a GPU, compiled", 24000 * _MIB, _http, within=""),
        Workload("vllm-cpu", "vLLM's engine on a CPU (docs/vllm.md)", 4200 * _MIB, _vllm, within=""),
    )
}
