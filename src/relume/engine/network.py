"""The network inside a container: the same addresses in every instance, so that CRIU can bind them again.

``lo`` with 127.0.0.1, with the sidecar's address, and with the instance's own inner address; and, where the
machine allows, an ``eth0`` that pasta (package passt) serves from user space: outgoing traffic becomes
sockets of the host, with no bridge, no NAT rule, no address to hand out, and nothing to clean but a process.
Nothing comes in that way: the published port dials from inside the namespace.
A pasta that ends is followed by another.

The inner address is on ``lo`` too, so that a restore need not wait for pasta before it binds sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from relume.linux import netns, process

INNER_ADDRESS = "10.88.0.2"
INNER_GATEWAY = "10.88.0.1"

_SHORT_LIVED = 10.0
_PAUSE = 1.0
"""Seconds before a pasta that lived for less than :data:`_SHORT_LIVED` is started anew."""


def pasta() -> str | None:
    """The pasta command, if this machine can use it."""
    return shutil.which("pasta") if Path("/dev/net/tun").exists() else None


class Network:
    """The inside of one network namespace, seen from the keeper."""

    def __init__(self, pid: int, *, sidecar: str) -> None:
        """``pid`` is any process in the namespace. Brings the addresses up. Raises OSError."""
        namespace = netns.open_of(pid)
        try:
            self.inside = netns.Inside(namespace)
        finally:
            os.close(namespace)
        self.inside.run(lambda: netns.loopback_up((INNER_ADDRESS, sidecar)))
        self._pasta: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def open_way_out(self, pid: int, log: Path) -> bool:
        """Start pasta for the namespace of ``pid``; False (and a line in ``log``) if it cannot be.

        From then on another takes the place of one that ends: connections through it are lost, those made later work.
        """
        command = pasta()
        if command is None:
            return False
        up = await self._bring_up(command, pid, log)
        if up:
            self._keeping = asyncio.create_task(self._keep_up(command, pid, log))
        return up

    async def _keep_up(self, command: str, pid: int, log: Path) -> None:
        with contextlib.suppress(OSError):  # the namespaces are gone, and nobody needs a way
            while self._pasta is not None:
                began = time.monotonic()
                status = await self._pasta.wait()
                if time.monotonic() - began < _SHORT_LIVED:
                    await asyncio.sleep(_PAUSE)
                with log.open("a") as line:
                    line.write(f"pasta ended with status {status}: another takes its place\n")
                await self._bring_up(command, pid, log)

    async def _bring_up(self, command: str, pid: int, log: Path) -> bool:
        with self._outgoing_held():
            await self._start_pasta(command, pid, log)
            return await self._interface_up()

    @contextlib.contextmanager
    def _outgoing_held(self) -> Iterator[None]:
        """A copy may run before pasta is there. Its first packet is late then; refused, it would fail the app."""
        unless_gone = contextlib.suppress(OSError)  # the namespace may be gone
        with unless_gone:
            self.inside.run(functools.partial(netns.hold_outgoing, True))
        try:
            yield
        finally:
            with unless_gone:
                self.inside.run(functools.partial(netns.hold_outgoing, False))

    async def _start_pasta(self, command: str, pid: int, log: Path) -> None:
        # By descriptor: runc's init is not dumpable, and pasta, its privileges dropped, may not look at its /proc.
        namespaces = [
            os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in ("net", "user")
        ]
        net, user = (f"/proc/self/fd/{descriptor}" for descriptor in namespaces)
        try:
            with log.open("ab") as errors:
                self._pasta = await asyncio.create_subprocess_exec(
                    command,
                    *(
                        "--foreground",
                        "--quiet",
                        "--runas",
                        "0",
                        "--config-net",
                        "--no-map-gw",
                        "--ipv4-only",
                    ),
                    *("--address", INNER_ADDRESS, "--netmask", "255.255.255.0", "--gateway", INNER_GATEWAY),
                    *("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"),
                    *("--netns", net, "--userns", user),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=namespaces,
                    preexec_fn=functools.partial(process.die_with_parent, os.getpid()),
                )
        finally:
            for descriptor in namespaces:
                os.close(descriptor)

    async def _interface_up(self) -> bool:
        """Wait until pasta has given the namespace a default route, or has died."""
        assert self._pasta is not None
        for _ in range(400):
            if self._pasta.returncode is not None:
                return False
            if await asyncio.to_thread(self.inside.run, netns.has_way_out):
                return True
            await asyncio.sleep(0.005)
        return False

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._pasta is not None and self._pasta.returncode is None:
            self._pasta.kill()
            await self._pasta.wait()
        self.inside.close()
