"""Notice that this process woke up in another container, and make its random generators its own.

The app asks for checkpoints by plain HTTP and need not tell anybody. Right after the import the sidecar is
simply asked. Later a checkpoint may come from a function, or from the node when the app is ready; then the
clocks tell: a restored process has a monotonic clock that goes on where it stopped (time_namespaces(7)) and
a wall clock that does not, so the difference of the two jumps by the time the checkpoint lay on disk. A
wall clock that was set looks the same and costs one needless question.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

# The SDK, which on the host is not the module of this name.
_sdk: Any = importlib.import_module("relume")

#: Seconds. A checkpoint is written and read in no less; clocks that are slewed drift by less between
#: requests.
_JUMP = 0.02


class RestoreWatch:
    """Reseeds once for every restore, unless the environment has ``RELUME_RESEED=0``, or the SDK's
    ``checkpoint()`` ended in this very copy: that has reseeded, or was told not to, and the app may have
    seeded since."""

    def __init__(self) -> None:
        self._restore_id: str | None = _sdk.restore_id()
        self._offset = _clocks_apart()

    def check(self) -> bool:
        """Whether a restore happened since the last call. Cheap: no question is asked unless the clocks
        jumped."""
        offset = _clocks_apart()
        if abs(offset - self._offset) < _JUMP:
            return False
        self._offset = offset
        return self.confirm()

    def confirm(self) -> bool:
        """The same, and asks the sidecar in any case."""
        found = _sdk.restore_id()
        self._offset = _clocks_apart()
        if found is None or found == self._restore_id:
            return False
        self._restore_id = found
        if os.environ.get("RELUME_RESEED") != "0" and found != _sdk._checkpoint.handled():
            _sdk.reseed()
        return True


def _clocks_apart() -> float:
    return time.time() - time.monotonic()
