"""The runner's own lines in the container's log, which no logging configuration of the app's takes away.

``logging.config.dictConfig`` switches off every logger that exists and that it does not name, unless it is
told otherwise, and an app may call it while it is imported. The runner's logger is therefore one that
``logging`` has no list of.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

log = logging.Logger("relume", logging.INFO)

_SERVER = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "uvicorn.access")


def log_to_stderr() -> None:
    """Lines of ours without a time stamp: the node keeps one for every line. The app's prints appear at once,
    though stdout is a pipe."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s relume: %(message)s"))
    log.addHandler(handler)


@contextlib.contextmanager
def server_loggers_kept() -> Iterator[None]:
    """The server's loggers are as much on at the end as they were at the beginning."""
    on = [logger for logger in map(logging.getLogger, _SERVER) if not logger.disabled]
    try:
        yield
    finally:
        for logger in on:
            logger.disabled = False
