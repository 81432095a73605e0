"""The runc command: finding it and CRIU, and building its argument lists.

Runs nothing itself: the keeper and the build run these lists, each in its own way.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from relume.errors import HostError

PREFIX = Path("/opt/relume")
"""Where script/bootstrap puts a CRIU of its own, as ``criu-VERSION/sbin/criu``."""


def find_runc() -> Path:
    """The runc command; ``$RELUME_RUNC`` wins. Raises HostError."""
    found = os.environ.get("RELUME_RUNC") or shutil.which("runc")
    if not found:
        raise HostError("runc is not installed", hint="apt-get install runc, or run script/bootstrap")
    return Path(found)


def find_criu() -> Path:
    """The CRIU command: ``$RELUME_CRIU``, else the newest in our prefix, else the system's. Raises HostError."""
    if named := os.environ.get("RELUME_CRIU"):
        return Path(named)
    private = sorted(PREFIX.glob("criu-*/sbin/criu"), key=_version)
    if private:
        return private[-1]
    if system := shutil.which("criu"):
        return Path(system)
    raise HostError("CRIU is not installed", hint="run script/bootstrap, which builds one in /opt/relume")


def _version(path: Path) -> tuple[int, ...]:
    name = path.parent.parent.name.removeprefix("criu-")
    return tuple(int(part) for part in name.split(".") if part.isdigit())


@dataclasses.dataclass(frozen=True, slots=True)
class Runc:
    """One runc with one state directory (``root``)."""

    binary: Path
    root: Path
    criu: Path | None = None

    def argv(self, *arguments: str, log: Path | None = None) -> list[str]:
        """The full argument list of ``runc ARGUMENTS``; with ``log``, runc's own errors go there as JSON."""
        command = [str(self.binary), "--root", str(self.root)]
        if log is not None:
            command += ["--log", str(log), "--log-format", "json"]
        if self.criu is not None:
            command += ["--criu", str(self.criu)]
        return [*command, *arguments]

    def environment(self) -> dict[str, str]:
        """Our environment with CRIU's directory first on PATH: runc >= 1.2 ignores ``--criu`` and looks there."""
        environment = dict(os.environ)
        if self.criu is not None:
            environment["PATH"] = f"{self.criu.parent}:{environment.get('PATH', os.defpath)}"
        return environment
