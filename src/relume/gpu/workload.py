"""A CUDA process to be checkpointed: ``python -m relume.gpu.workload`` (script/gpu-check and the tests start it).

It holds device memory of known content through the plain driver API (ctypes on libcuda, no CUDA toolkit, no torch), and
answers one JSON object a line on stdin with one on stdout:

    {"op": "fill", "size": N, "blocks": K, "seed": S}    allocate K blocks, N bytes in all, and write them
    {"op": "write", "seed": S}                           write them anew
    {"op": "hash"}          -> {"hash": "...", "bytes": N}    of all device memory, read back
    {"op": "graph"}         capture a graph of memsets and copies between blocks on a stream of its own; keep it
    {"op": "launch"}        run the graph that was captured
    {"op": "bandwidth"}     -> {"to_device", "to_host"}       bytes/s of a copy from and to pinned memory
    {"op": "exit"}

With a folder as its argument it reads ``request.json`` there and writes ``answer.json``, by name and without holding
a file open, so that it can be driven on both sides of a CRIU checkpoint.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

CHUNK: Final = 16 << 20
_POLL_S: Final = 0.02


class Device:
    """The driver calls this needs, on device 0's primary context. Sizes in bytes; raises RuntimeError by name."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)

    def __call__(self, function: str, *args: Any) -> None:
        code = getattr(self._cuda, function)(*args)
        if code:
            name = ctypes.c_char_p()
            self._cuda.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"{function}: {(name.value or b'?').decode()} ({code})")

    def handle(self, function: str, *args: Any) -> ctypes.c_void_p:
        """A call whose first argument is an opaque pointer that it fills in."""
        result = ctypes.c_void_p()
        self(function, ctypes.byref(result), *args)
        return result


class Workload:
    def __init__(self) -> None:
        self._device = Device()
        self._blocks: list[tuple[int, int]] = []
        self._graph: ctypes.c_void_p | None = None
        self._stream: ctypes.c_void_p | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request.pop("op")
        try:
            return {"ok": True, **(getattr(self, f"do_{operation}")(**request) or {})}
        except (RuntimeError, AttributeError, TypeError, IndexError) as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}

    def do_fill(self, size: int, blocks: int = 1, seed: int = 0) -> None:
        for _ in range(blocks):
            block = max(4096, size // blocks // 4096 * 4096)
            address = ctypes.c_uint64()
            self._device("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(block))
            self._blocks.append((address.value, block))
        self.do_write(seed)

    def do_write(self, seed: int) -> None:
        # One random chunk a block, with its place written into each copy of it: quick to make, and no two alike.
        generator = random.Random(seed)
        for address, size in self._blocks:
            chunk = bytearray(generator.randbytes(min(size, CHUNK)))
            for at, length in _pieces(size):
                chunk[:8] = at.to_bytes(8, "little")
                buffer = (ctypes.c_char * length).from_buffer(chunk)
                self._device(
                    "cuMemcpyHtoD_v2", ctypes.c_uint64(address + at), buffer, ctypes.c_size_t(length)
                )
                del buffer

    def do_hash(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        buffer = ctypes.create_string_buffer(CHUNK)
        for address, size in self._blocks:
            for at, length in _pieces(size):
                self._device(
                    "cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(address + at), ctypes.c_size_t(length)
                )
                digest.update(memoryview(buffer)[:length])
        return {"hash": digest.hexdigest(), "bytes": sum(size for _, size in self._blocks)}

    def do_graph(self) -> None:
        device = self._device
        stream = device.handle("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING
        device("cuStreamBeginCapture_v2", stream, 0)
        for number, ((source, size), (target, room)) in enumerate(
            zip(self._blocks, self._blocks[1:], strict=False)
        ):
            words = min(size, room) // 8
            device("cuMemsetD32Async", ctypes.c_uint64(source), number + 1, ctypes.c_size_t(words), stream)
            device(
                "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source),
                ctypes.c_size_t(words * 4), stream,
            )  # fmt: skip
        captured = ctypes.c_void_p()
        device("cuStreamEndCapture", stream, ctypes.byref(captured))
        self._graph = device.handle("cuGraphInstantiateWithFlags", captured, ctypes.c_ulonglong(0))
        self._stream = stream

    def do_launch(self) -> None:
        self._device("cuGraphLaunch", self._graph, self._stream)
        self._device("cuStreamSynchronize", self._stream)

    def do_bandwidth(self, size: int = 256 << 20) -> dict[str, float]:
        address = ctypes.c_uint64()
        pinned = self._device.handle("cuMemAllocHost_v2", ctypes.c_size_t(size))
        self._device("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        started = time.perf_counter()
        self._device("cuMemcpyHtoD_v2", address, pinned, ctypes.c_size_t(size))
        middle = time.perf_counter()
        self._device("cuMemcpyDtoH_v2", pinned, address, ctypes.c_size_t(size))
        ended = time.perf_counter()
        self._device("cuMemFree_v2", address)
        self._device("cuMemFreeHost", pinned)
        return {"to_device": size / (middle - started), "to_host": size / (ended - middle)}

    def do_kernel(self, ms: int) -> None:
        """Submit work that takes this long. Only the tests' driver has it: plain ctypes carries no GPU code."""
        self._device._cuda.fake_kernel(ms)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(CHUNK, size - at)) for at in range(0, size, CHUNK))


def _serve_folder(folder: Path) -> None:
    workload: Workload | None = None
    request, answer, draft = folder / "request.json", folder / "answer.json", folder / "answer.draft"
    while True:
        try:
            message = json.loads(request.read_text())
        except FileNotFoundError:
            time.sleep(_POLL_S)
            continue
        request.unlink()
        if message["op"] == "exit":
            return
        workload = workload or Workload()
        draft.write_text(json.dumps(workload.answer(message)))
        draft.rename(answer)


def _serve_pipe() -> None:
    workload = Workload()
    print(json.dumps({"ready": True, "pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "exit":
            return
        print(json.dumps(workload.answer(message)), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _serve_folder(Path(sys.argv[1]))
    else:
        _serve_pipe()
