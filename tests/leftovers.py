"""What a node, or one instance of it, has on the machine right now: for tests that nothing stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness import Relume
from relume.linux import cgroup, mounts

RUN = Path("/run/relume")


def node_id(relume: Relume) -> str:
    return str(relume.json("node", "status")["node_id"])


def of_instance(node: str, instance: str) -> list[str]:
    """Directory, mounts, control groups and processes of one instance."""
    return _below(RUN / node / instance, f"/relume/{node}/{instance}") + _mentioning(
        f"{RUN}/{node}/{instance}"
    )


def of_node(relume: Relume, node: str) -> list[str]:
    """The same of a whole node; its processes and their helpers also by the state in their environment."""
    with_state = [
        f"process {pid}: {_command(pid)}"
        for pid in _pids()
        if f"RELUME_STATE={relume.state}".encode() in _file(pid, "environ").split(b"\0")
    ]
    staged = [f"mount {point}" for point in mounts.under(relume.state)]
    return _below(RUN / node, f"/relume/{node}") + _mentioning(f"{RUN}/{node}") + with_state + staged


def interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def soon_nothing(look, *arguments, patience: float = 60) -> None:  # type: ignore[no-untyped-def]
    """Assert that ``look(*arguments)`` finds nothing, or at least not for long."""
    deadline = time.monotonic() + patience
    while found := look(*arguments):
        assert time.monotonic() < deadline, "\n".join(found)
        time.sleep(0.1)


def _below(directory: Path, group: str) -> list[str]:
    found = [f"mount {point}" for point in mounts.under(directory)]
    found += [f"directory {directory}"] if directory.exists() else []
    found += [f"cgroup {path}" for path in cgroup.directories(group)]
    return found + [f"in the cgroup: {pid}: {_command(pid)}" for pid in cgroup.processes(group)]


def _mentioning(path: str) -> list[str]:
    return [
        f"process {pid}: {_command(pid)}"
        for pid in _pids()
        if path.encode() in _file(pid, "cmdline") and pid != os.getpid()
    ]


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _file(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    return _file(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")[:300]
