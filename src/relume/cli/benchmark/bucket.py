"""A real S3 server on loopback for `relume bench --region`, and a road to it that lets only so much through.

The server is localbucket (PyPI), which comes with the development environment. The road is a process of its own, so
that it takes no turns with what is measured; bytes pass it in the kernel (splice(2)).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from relume.cli.benchmark.server import free_port, running
from relume.errors import HostError
from relume.store.upload import Throttle

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "relume-bench",
    "AWS_SECRET_ACCESS_KEY": "relume-bench",
    "AWS_REGION": "us-east-1",
}

_BUCKET = "bucket"
_PIECE = 256 << 10
_BURST_SECONDS = 0.01


class Bucket:
    """A running server; its objects are files below ``objects``."""

    def __init__(self, root: Path, endpoint: str) -> None:
        self.objects = root / _BUCKET
        self.endpoint = endpoint

    def url(self, prefix: str, endpoint: str | None = None) -> str:
        """As `[store] url`."""
        return (
            f"s3://{_BUCKET}/{prefix}?endpoint={endpoint or self.endpoint}&path_style=true&region=us-east-1"
        )

    def warm(self, prefix: str) -> None:
        """Read every object once: what a server far away has in memory is not this node's page cache."""
        for path in (self.objects / prefix).rglob("*"):
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.read(4 << 20):
                        pass


@contextlib.contextmanager
def bucket(root: Path) -> Iterator[Bucket]:
    """A bucket in ``root`` while the block runs. Raises HostError where the server is not installed."""
    program = Path(sys.executable).with_name("localbucket")
    if not program.exists():
        raise HostError(f"{program} is not there", hint="script/bootstrap --dev installs the S3 server")
    (root / _BUCKET).mkdir(parents=True)
    port = free_port()
    command = [str(program), "--port", str(port), str(root)]
    with running(command, port, root.parent / "bucket.log") as endpoint:
        yield Bucket(root, endpoint)


@contextlib.contextmanager
def narrow_road(bucket: Bucket, bytes_per_second: int, log: Path) -> Iterator[str]:
    """Another endpoint of ``bucket``, through which at most ``bytes_per_second`` pass in each direction."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=256) as listening,
        road_behind(listening, bucket, log, bytes_per_second),
    ):
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextlib.contextmanager
def road_behind(
    listening: socket.socket, bucket: Bucket, log: Path, bytes_per_second: int | None = None
) -> Iterator[None]:
    """What connects to ``listening``, a socket of whatever network, reaches ``bucket`` while the block runs."""
    upstream = bucket.endpoint.removeprefix("http://")
    descriptor = listening.fileno()
    command = [sys.executable, "-m", __name__, upstream, str(descriptor), str(bytes_per_second or 0)]
    with log.open("wb") as out:
        road = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(descriptor,)
        )
    try:
        yield  # what connects before the road is there waits in the backlog
    finally:
        road.kill()
        road.wait()


# --- the road's own process -----------------------------------------------------------------------


def _serve(upstream: str, listening: int, bytes_per_second: int | None) -> None:
    there = Throttle(bytes_per_second, burst_s=_BURST_SECONDS)
    back = Throttle(bytes_per_second, burst_s=_BURST_SECONDS)
    host, _, upstream_port = upstream.partition(":")
    with socket.socket(fileno=listening) as server:
        while True:
            client, _ = server.accept()
            peer = socket.create_connection((host, int(upstream_port)))
            for one, other, throttle in ((client, peer, there), (peer, client, back)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pass, args=(one, other, throttle), daemon=True).start()


def _pass(source: socket.socket, sink: socket.socket, throttle: Throttle) -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIECE)
    try:
        while came := os.splice(source.fileno(), write, _PIECE):
            throttle.take(came)
            while came:
                came -= os.splice(read, sink.fileno(), came)
    except OSError:
        pass  # one of the two hung up
    finally:
        os.close(read)
        os.close(write)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Forward TCP to UPSTREAM, so many bytes a second each way.")
    parser.add_argument("upstream")
    parser.add_argument("listening", type=int, help="descriptor of a listening socket")
    parser.add_argument("bytes_per_second", type=int, help="0: as fast as it goes")
    options = parser.parse_args()
    _serve(options.upstream, options.listening, options.bytes_per_second or None)


if __name__ == "__main__":
    _main()
