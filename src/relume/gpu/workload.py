"""A CUDA process to be checkpointed: ``python -m relume.gpu.workload`` (script/gpu-check and the tests start it).

It holds device memory of known content through the plain driver API (ctypes on libcuda, no CUDA toolkit, no torch), and
answers one JSON object a line on stdin with one on stdout:

    {"op": "fill", "size": N, "blocks": K, "seed": S}    allocate K blocks, N bytes in all, and write them
    {"op": "write", "seed": S}                           write them anew
    {"op": "hash"}          -> {"hash": "...", "bytes": N}    of all device memory, read back
    {"op": "graph"}         capture a graph of memsets and copies between blocks on a stream of its own; keep it
    {"op": "launch"}        run the graph that was captured
    {"op": "mix", "seed": S}         a kernel of ours (PTX text, compiled by the driver) over all device memory
    {"op": "register", "size": N}    host memory of ours, ordinary and private, that the driver pins (cuMemHostRegister)
    {"op": "pinned"}        -> {"equal": true}    that memory goes to the device and back unchanged
    {"op": "bandwidth"}     -> {"to_device", "to_host"}       bytes/s of a copy from and to pinned memory
    {"op": "exit"}

With a folder as its argument it reads ``request.json`` there and writes ``answer.json``, by name and without holding
a file open, so that it can be driven on both sides of a CRIU checkpoint.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

CHUNK: Final = 16 << 20
_POLL_S: Final = 0.02
_THREADS: Final = 256
_PR_SET_PTRACER: Final = 0x59616D61

# x = (x ^ seed) * 1664525 + 1013904223, for each 32-bit word. Turing is the oldest chip that `compute` names.
_PTX: Final = b"""
.version 6.4
.target sm_75
.address_size 64
.visible .entry relume_mix(.param .u64 memory, .param .u64 words, .param .u32 seed)
{
    .reg .pred %p<2>;
    .reg .b32 %r<6>;
    .reg .b64 %d<5>;
    ld.param.u64 %d1, [memory];
    ld.param.u64 %d2, [words];
    ld.param.u32 %r1, [seed];
    cvta.to.global.u64 %d1, %d1;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mul.wide.u32 %d3, %r2, %r3;
    cvt.u64.u32 %d4, %r4;
    add.u64 %d3, %d3, %d4;
    setp.ge.u64 %p1, %d3, %d2;
    @%p1 bra DONE;
    shl.b64 %d4, %d3, 2;
    add.u64 %d4, %d1, %d4;
    ld.global.u32 %r5, [%d4];
    xor.b32 %r5, %r5, %r1;
    mul.lo.u32 %r5, %r5, 1664525;
    add.u32 %r5, %r5, 1013904223;
    st.global.u32 [%d4], %r5;
DONE:
    ret;
}
\0"""


class Device:
    """The driver calls this needs, on device 0's primary context. Sizes in bytes; raises RuntimeError by name."""

    def __init__(self) -> None:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # NVML's order; cuInit reads it
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
        self._function: ctypes.c_void_p | None = None
        self._registered: mmap.mmap | None = None
        # Where Yama lets only parents look into a process, the helper that is to checkpoint this one is none.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)

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

    def do_mix(self, seed: int) -> None:
        if self._function is None:
            module = self._device.handle("cuModuleLoadData", ctypes.c_char_p(_PTX))
            self._function = self._device.handle(
                "cuModuleGetFunction", module, ctypes.c_char_p(b"relume_mix")
            )
        for address, size in self._blocks:
            words = size // 4
            values = (ctypes.c_uint64(address), ctypes.c_uint64(words), ctypes.c_uint32(seed & 0xFFFFFFFF))
            pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
            grid = (-(-words // _THREADS), 1, 1)
            self._device(
                "cuLaunchKernel", self._function, *grid, _THREADS, 1, 1, 0, self._stream, pointers, None
            )  # fmt: skip
        self._device("cuCtxSynchronize")

    def do_register(self, size: int) -> None:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.write(random.Random(size).randbytes(size))
        self._registered = memory
        self._device("cuMemHostRegister_v2", self._host(), ctypes.c_size_t(size), ctypes.c_uint(0))

    def _host(self) -> ctypes.c_void_p:
        assert self._registered is not None
        return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(self._registered)))

    def do_pinned(self) -> dict[str, bool]:
        if self._registered is None:
            raise RuntimeError("nothing is registered")
        size = ctypes.c_size_t(len(self._registered))
        address, back = ctypes.c_uint64(), ctypes.create_string_buffer(size.value)
        self._device("cuMemAlloc_v2", ctypes.byref(address), size)
        self._device("cuMemcpyHtoD_v2", address, self._host(), size)
        self._device("cuMemcpyDtoH_v2", back, address, size)
        self._device("cuMemFree_v2", address)
        same = random.Random(size.value).randbytes(size.value)
        return {"equal": bytes(back) == same == self._registered[:]}

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
        """Submit work that takes this long. Only the tests' driver has it."""
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
