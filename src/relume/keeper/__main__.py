"""``python -m relume.keeper CONTAINER_JSON``: the keeper process of one instance."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from relume.engine.jobs import Container
from relume.keeper.server import Server
from relume.linux import process

SOCKET = "keeper.sock"


def main() -> None:
    """Become the keeper; the one argument is a :class:`Container` as JSON."""
    container = Container(**json.loads(sys.argv[1]))
    os.umask(0o022)  # runc makes cgroups and mount points, and the mapped root must be able to look at them
    process.become_subreaper()
    process.set_name("relume-keeper")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # what belongs to the node is not for us
    asyncio.run(Server(container, Path(container.runtime) / SOCKET).run())


if __name__ == "__main__":
    main()
