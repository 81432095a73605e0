"""Device nodes of a copy that was given other GPUs than the ones in its checkpoint.

CRIU restores the mounts of the checkpoint and no others, so the copy has the old GPU's node and lacks the new
one's; the driver finds a GPU by the name of its node (ai-dynamo/snapshot #379: CUDA_ERROR_NOT_SUPPORTED without it).
``relume.gpu.cdi.for_copy`` satisfies CRIU for the old names; ``change`` here takes those away in the running copy and
binds the new nodes, before the driver restores its device memory: /dev is then as in any container with that GPU.
Which devices may be opened is the cgroup's business, and its rules come from the copy's own config.

It is done by a process of its own, ``python -m relume.gpu.nodes PID +NEW... -OLD...``, since a thread cannot change
the mount namespace of a process alone (setns(2), CLONE_NEWNS). Needs host root.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from relume.errors import GpuError
from relume.linux import proc, syscall

_OPEN_TREE_CLONE: Final = 1
_AT_FDCWD: Final = -100
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_CLONE_NEWNS: Final = 0x00020000
_MNT_DETACH: Final = 2


async def change(pid: int, new: Sequence[str], old: Sequence[str]) -> None:
    """Make the host's devices ``new`` appear under the same names in the mount namespace of ``pid``, and ``old`` go.

    Raises GpuError with what the kernel said.
    """
    if not new and not old:
        return
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "relume.gpu.nodes",
        str(pid),
        *(f"+{path}" for path in new),
        *(f"-{path}" for path in old),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise GpuError(
            f"the device nodes of the copy cannot be made those of its GPU: {last}",
            hint="see `relume doctor`",
        )


def _change(pid: int, paths: Sequence[str], old: Sequence[str]) -> None:
    owner = _root_of(pid)
    trees = [
        syscall.call(syscall.OPEN_TREE, _AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE, what=path)
        for path in paths
    ]
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    libc = syscall.libc()
    if libc.setns(namespace, _CLONE_NEWNS) != 0:
        raise syscall.error(f"setns to the mounts of {pid}")
    for path in old:
        libc.umount2(
            os.fsencode(path), _MNT_DETACH
        )  # fails where nothing is mounted, and then only the name goes
        with _as(owner):
            Path(path).unlink(missing_ok=True)
    for path, tree in zip(paths, trees, strict=True):
        with _as(owner):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
        syscall.call(
            syscall.MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH, what=path
        )


@contextlib.contextmanager
def _as(owner: int) -> Iterator[None]:
    """A tmpfs of a user namespace takes files of ids that are mapped in it, and ours is not."""
    libc = syscall.libc()
    libc.setfsgid(ctypes.c_uint(owner))
    libc.setfsuid(ctypes.c_uint(owner))
    try:
        yield
    finally:
        libc.setfsuid(ctypes.c_uint(0))
        libc.setfsgid(ctypes.c_uint(0))


def _root_of(pid: int) -> int:
    """The host id of root inside: the process's own, where its user namespace is ours (user_namespaces(7))."""
    if proc.namespace(pid, "user") == proc.namespace(os.getpid(), "user"):
        return 0
    for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines():
        inside, outside, _count = map(int, line.split())
        if inside == 0:
            return outside
    return 0


if __name__ == "__main__":
    _named = {sign: [path[1:] for path in sys.argv[2:] if path[0] == sign] for sign in "+-"}
    _change(int(sys.argv[1]), _named["+"], _named["-"])
