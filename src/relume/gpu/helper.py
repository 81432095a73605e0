"""The process that keeps the CUDA driver loaded: ``python -m relume.gpu.helper FD``.

Loading the driver (cuInit) takes seconds on a machine with several GPUs, so it is done once, by a process of its own:
one that can hang or crash inside the driver without taking the node along. It reads one JSON object a line from
the socket FD and answers one a line, out of order where calls take different times:

    {"id": 7, "call": "lock", "args": {"pid": 1234, "timeout_ms": 10000}}
    {"id": 7, "result": null}    or    {"id": 7, "error": {"call", "result", "name", "pid"}}

The first line it writes says whether the driver is usable: {"ready": true, "cuda_version": 13000, "init_s": 2.6}
or {"ready": false, "error": {"code", "message", "hint"}}; NVML is answered for either way. It ends when the socket
closes. It undoes nothing on its own: after a death in the middle of a call the state is in the driver, and
``story`` asks for it there.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from relume.errors import RelumeError
from relume.gpu import nvml
from relume.gpu.driver import CudaDriver, DriverError, GpuDriver

MAX_CALLS = 64
"""Calls at once. Most wait for the driver; a thread that waits costs nothing."""


class Server:
    """Answers the calls of one client over one socket."""

    def __init__(self, connection: socket.socket, driver: GpuDriver | None) -> None:
        self._connection = connection
        self._writing = threading.Lock()
        self._calls: dict[str, Callable[..., Any]] = {"survey": lambda: nvml.survey().as_dict()}
        if driver is not None:
            self._calls |= {
                "state": lambda pid: int(driver.state(pid)),
                "restore_thread_id": driver.restore_thread_id,
                "lock": driver.lock,
                "checkpoint": driver.checkpoint,
                "restore": driver.restore,
                "unlock": driver.unlock,
            }

    def serve(self) -> None:
        """Until the client closes its end. Calls that still wait in the driver are left behind."""
        pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="driver")
        with self._connection.makefile("rb") as lines:
            for line in lines:
                pool.submit(self._answer, json.loads(line))

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            result = self._calls[request["call"]](**request["args"])
        except DriverError as error:
            about = {"call": error.call, "result": error.result, "name": error.name, "pid": error.pid}
            self.send({"id": request["id"], "error": about})
        except Exception as error:
            about = {
                "call": request.get("call"),
                "result": -1,
                "name": f"{type(error).__name__}: {error}",
                "pid": 0,
            }
            self.send({"id": request["id"], "error": about})
        else:
            self.send({"id": request["id"], "result": result})

    def send(self, message: dict[str, Any]) -> None:
        with self._writing:
            self._connection.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    started = time.monotonic()
    driver: CudaDriver | None = None
    try:
        driver = CudaDriver.load()
        hello: dict[str, Any] = {"ready": True, "cuda_version": driver.cuda_version()}
    except RelumeError as error:
        hello = {"ready": False, "error": error.as_dict()}
    server = Server(connection, driver)
    server.send({**hello, "init_s": round(time.monotonic() - started, 3)})
    try:
        server.serve()
    except OSError:
        pass  # the client is gone, which is the signal to end
    # Threads may be stuck inside the driver; nothing of ours is left to flush.
    os._exit(0)


if __name__ == "__main__":
    main()
