"""``relume node run``: open the node, serve its socket, let go at SIGTERM or SIGINT. Instances run on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from aiohttp import web

from relume.config import NodeConfig
from relume.node import threads
from relume.node.agent import Node
from relume.node.api import application

_THREADS = 32


def run(config: NodeConfig, state: Path) -> None:
    """Serve until told to stop. Raises RelumeError when the node cannot be opened."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    asyncio.run(_serve(config, state))


async def _serve(config: NodeConfig, state: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # They mostly wait: for a disk, a mount, a store that is asked. asyncio's own number (6 with two processors) is one
    # for computing, and a start would stand behind the checkpoints that are being hashed.
    loop.set_default_executor(threads.pool(_THREADS, "node"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = Node(config, state)
    try:
        await node.open()
        runner = web.AppRunner(application(node), access_log=None, shutdown_timeout=2.0)
        await runner.setup()
        await web.SockSite(runner, _listener(node.places.socket)).start()
        logging.getLogger(__name__).info("node %s serves %s", node.places.node_id, node.places.socket)
        await stop.wait()
        node.places.socket.unlink(missing_ok=True)
        await runner.cleanup()
    finally:
        await node.close()
    # A thread may still wait for a store that does not answer. Whatever it does may be cut short anywhere, as by a
    # power failure; waiting for it would hold up a machine that shuts down.
    logging.shutdown()
    os._exit(0)


def _listener(path: Path) -> socket.socket:
    """A listening unix socket that only root can connect to, from its first moment."""
    path.unlink(missing_ok=True)  # the lock on the state says that nobody listens there
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(old)
    return made
