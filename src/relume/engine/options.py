"""CRIU's options for us, as the text of its configuration file.

runc (1.1) hands CRIU a fixed set of options and no more; the rest goes through the file that the annotation
``org.criu.config`` names. Each line says what breaks without it (measured; names of the failing things in
CRIU's own words).
"""

from __future__ import annotations

from pathlib import Path

ANNOTATION = "org.criu.config"

_COMMON = (
    "ext-unix-sk",  # one end of a unix connection outside, e.g. a log socket
    "file-locks",  # flock and record locks: "Some file locks are hold by dumping tasks"
    "network-lock skip",  # no iptables/nft needed: nothing comes in while frozen, and copies have their own namespace
    "verbosity 3",  # warnings, errors and the stages; 4 costs milliseconds
)

_DUMP = (
    "link-remap",  # names deleted while open, e.g. POSIX semaphores: "Can't create link remap"
    "ghost-limit 1073741824",  # deleted open files over 1 MB: "Can't dump ghost file"
    "skip-in-flight",  # somebody knocks at a port during the dump: "In-flight connection"
)


def for_dump(*, loopback: str, action_script: Path, work: Path) -> str:
    """``loopback`` is "keep" (connections with both ends inside survive) or "close" (all TCP is closed)."""
    return _text(*_COMMON, *_DUMP, _tcp(loopback), f"action-script {action_script}", _no_plugins(work))


def for_restore(*, loopback: str, work: Path, cgroup: str, leave_stopped: bool = False) -> str:
    """``cgroup`` is the copy's; ``leave_stopped`` ends the restore before the first instruction, for prepared
    instances."""
    return _text(
        *_COMMON,
        _tcp(loopback),
        # runc 1.1 names the group to CRIU on version 1 only (criuApplyCgroups). On version 2 CRIU would make the
        # original's anew, and the copy would run in it: without limits, and where no kill finds it.
        f"cgroup-root {cgroup}",
        *(("leave-stopped",) if leave_stopped else ()),
        _no_plugins(work),
    )


def _no_plugins(work: Path) -> str:
    """CRIU's own CUDA plugin, where it is installed, would do at its moments what relume.gpu does at ours: it is
    looked for in ``work`` instead, CRIU's folder for logs, where no plugin lies (``criu --help``: libdir)."""
    return f"libdir {work}"


def _tcp(loopback: str) -> str:
    return "tcp-established" if loopback == "keep" else "tcp-close"


def _text(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)
