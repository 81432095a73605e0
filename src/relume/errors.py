"""Every error relume raises on purpose.

A class is one kind of failure: its ``code`` is what programs match on, its ``exit_code`` is what the CLI
exits with. An instance says what happened and where (``message``), and what to do next (``hint``).
``details`` are the same facts for programs; they appear beside the code in ``-o json``.

Rooms raise the classes below and map foreign exceptions to them at their own boundary; nothing above a
room has to know which library it uses.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

SHORTAGES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE})
"""What an OSError says when the machine lacks room, memory, processes or descriptors."""


class RelumeError(Exception):
    """Base of all. Catch this one at a boundary; raise a subclass."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """The ``error`` object of the CLI's and the API's JSON: code, message, hint and the details."""
        return {"code": self.code, "message": self.message, "hint": self.hint, **self.details}


# --- config ---------------------------------------------------------------------------------------


class ConfigError(RelumeError):
    """A file a user wrote cannot be read or holds a value out of range."""

    code = "config"
    exit_code = 2


# --- build ----------------------------------------------------------------------------------------


class BuildError(RelumeError):
    """A build could not be made. Nothing of it is left behind."""

    code = "build"


# --- linux, runc, engine --------------------------------------------------------------------------


class HostError(RelumeError):
    """The machine lacks something that is needed: a program, a kernel feature, a privilege, room."""

    code = "host"


class EngineError(RelumeError):
    """runc or CRIU failed. ``details`` hold the lines of their logs that matter."""

    code = "engine"


class Unsupported(EngineError):
    """A process holds something that cannot be saved. ``culprits`` is a list of pid, process, what, hint."""

    code = "unsupported"


# --- pager ----------------------------------------------------------------------------------------


class PagerError(RelumeError):
    """Memory could not be served. The instance must not run on."""

    code = "pager"


class ImageError(RelumeError):
    """CRIU's image files are damaged, incomplete, or of a format we do not know."""

    code = "image"


# --- node -----------------------------------------------------------------------------------------


class NodeUnreachable(RelumeError):
    """No node answers on the socket."""

    code = "node_unreachable"
    exit_code = 3


class NotFound(RelumeError):
    """No app, build, instance or checkpoint of that name."""

    code = "not_found"
    exit_code = 4


class Conflict(RelumeError):
    """The state does not allow it now: locked by another node, still running, already there."""

    code = "conflict"


class BadRequest(RelumeError):
    """A name or value that came over the API or the command line is not acceptable."""

    code = "bad_request"
    exit_code = 2


class StartFailed(RelumeError):
    """An instance did not become ready. ``details`` hold its last log lines and exit status."""

    code = "start_failed"


# --- store ----------------------------------------------------------------------------------------


class StoreError(RelumeError):
    """The store did not do what was asked."""

    code = "store"


class ObjectMissing(StoreError):
    """The store answers, and has no object of that name."""

    code = "object_missing"


class Superseded(StoreError):
    """The lease under which this was made is gone, or a newer generation exists. Give up; the other one counts."""

    code = "superseded"


class Untrusted(StoreError):
    """A signature, hash, version, size or path in something read from outside is bad. Never a warning."""

    code = "untrusted"


# --- gpu ------------------------------------------------------------------------------------------


class GpuError(RelumeError):
    """The CUDA driver refused or failed. ``code`` becomes ``gpu/...`` in answers."""

    code = "gpu"


class GpuUnavailable(GpuError):
    """No GPU, no driver, or no process that can talk to it."""

    code = "gpu/unavailable"


class GpuDriverTooOld(GpuError):
    """The driver lacks the checkpoint functions, or cannot restore onto another GPU."""

    code = "gpu/driver-too-old"


class GpuUnsupported(GpuError):
    """Something in use that the driver cannot save: managed memory, IPC, NCCL, MIG, MPS. Nothing was frozen."""

    code = "gpu/unsupported"


class GpuMemory(GpuError):
    """Host and device memory together do not fit the container's limit. Nothing was frozen."""

    code = "insufficient_memory"


class GpuTimeout(GpuError):
    """The driver did not answer in time: work that never ends, or a call that hangs."""

    code = "gpu/timeout"


class GpuLost(GpuError):
    """Processes that cannot be brought back to running. The caller must kill the instance and boot it.

    ``details["lost"]`` is a list of pid and reason.
    """

    code = "gpu/lost"


# --- cli ------------------------------------------------------------------------------------------


class CallFailed(RelumeError):
    """An app did not answer a `relume call`, or answered with an HTTP error."""

    code = "call_failed"
