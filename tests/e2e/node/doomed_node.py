"""`doomed_node.py POINT NTH ARGUMENTS...`: the command line, killed by SIGKILL at the NTH time it comes to POINT.

POINT is one of relume.store.faults. A collection here deletes at once: a day's grace is nothing to wait for. The
hook is of this process alone: keepers and pagers live on, as they do when a node is killed.
"""

from __future__ import annotations

import os
import signal
import sys

from relume.cli import main
from relume.store import faults, gc

_point, _nth = sys.argv[1], int(sys.argv[2])
_hits = 0


def _hook(name: str) -> None:
    global _hits
    _hits += name == _point
    if name == _point and _hits == _nth:
        os.kill(os.getpid(), signal.SIGKILL)


_collect = gc.collect


def _at_once(*arguments: object, grace_s: float, **options: object) -> object:
    return _collect(*arguments, grace_s=0.0, **options)  # type: ignore[arg-type]


gc.collect = _at_once  # type: ignore[assignment]
faults.install(_hook)
sys.argv[1:] = sys.argv[3:]
sys.exit(main.main())
