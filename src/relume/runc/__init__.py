"""runc: the OCI runtime config that we run, and the command that runs it."""

from relume.runc.command import Runc, find_criu, find_runc
from relume.runc.spec import Limits, Mount, Spec

__all__ = ["Limits", "Mount", "Runc", "Spec", "find_criu", "find_runc"]
