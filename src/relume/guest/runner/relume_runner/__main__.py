"""Import the app, then serve it. See the package's docstring."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from ._app import App
from ._load import LoadFailed, Stopped, load
from ._log import log, log_to_stderr, server_loggers_kept
from ._restore import RestoreWatch


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    log_to_stderr()
    # As pid 1 of a container this process ignores SIGTERM unless it handles it, and imports can take minutes.
    signal.signal(signal.SIGTERM, _stop)

    # The server's own modules are loaded before the app's: a checkpoint taken by the app then has them too.
    app = App(concurrency=options.concurrency)
    config = uvicorn.Config(
        app, host="0.0.0.0", port=options.port, log_level="warning", lifespan="off", server_header=False
    )
    config.load()
    watch = RestoreWatch()

    try:
        with server_loggers_kept():
            functions = load(options.file)
    except Stopped:
        return 128 + signal.SIGTERM
    except LoadFailed as error:
        log.error("%s", error)
        return 1
    if watch.confirm():
        log.info("this container was restored from a checkpoint")

    app.serve(functions, watch)
    log.info("serving %s on port %d", ", ".join(f"POST /{name}" for name in functions), options.port)
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        return 1
    # Here only an uvicorn < 0.29 arrives; later ones raise the signal again, and with it Stopped.
    return 128 + signal.SIGTERM if server.should_exit else 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="relume_runner", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="where to listen, on all addresses")
    parser.add_argument("--concurrency", type=int, default=100, help="how many calls run at once")
    parser.add_argument("--file", type=Path, default=Path("main.py"), help="the app's file (main.py)")
    options = parser.parse_args(argv)
    if options.concurrency < 1:
        parser.error("--concurrency must be at least 1")
    return options


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
