"""Boot, restore and dump of one container by runc and CRIU, top to bottom. Runs inside the keeper.

What it guarantees: a container either runs with its stdio, network and exit status in our hands, or an
:class:`EngineError` says why not and no process of it is left. A dump ends in a thawed container whatever
happens, within its time-out. What it does not do: decide, publish, or clean directories (the node does).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from relume.engine import held, tmpfs
from relume.engine.gate import Gate
from relume.engine.jobs import Container, DumpJob, DumpResult, RestoreJob
from relume.engine.lazy_pages import DAEMON, LazyPages
from relume.engine.network import Network
from relume.engine.paging import PagerProcess
from relume.engine.stdio import Sink, Stdio
from relume.errors import EngineError, Unsupported
from relume.linux import affinity, cgroup, netns, process, tcp
from relume.linux.affinity import Affinity
from relume.runc import Runc
from relume.sidecar import ADDRESS, PORT

_INTERRUPT_ONLY = "137"
"""CRIU's fault number that stops tasks by PTRACE_INTERRUPT alone, without the freezer (compel's
interrupt-only mode, which its CUDA plugin uses). With the v1 freezer, a task that is also stopped by SIGSTOP
hangs the dump for ever in the kernel's ptrace_attach."""

_ALONE = ("unshare", "--mount", "--propagation", "private", "--")
"""runc and CRIU get a mount namespace of their own: CRIU mounts cgroup hierarchies for a moment (its cgyard),
and a runc that boots another container at that moment would find them and fail."""

_KILLED_PAUSE = 0.5
"""Seconds between two looks for a process that was killed while it was frozen."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Copied:
    """What was saved beside CRIU's images while all was frozen, and in how many seconds."""

    report: held.HeldReport
    affinity: Affinity
    seconds: float


class Criu:
    """The engine's hold on one container."""

    def __init__(
        self,
        container: Container,
        *,
        sink: Sink,
        on_network: Callable[[socket.socket], Awaitable[None]],
        pager: PagerProcess | None = None,
    ) -> None:
        """``sink`` gets what it prints; ``on_network`` gets the sidecar's listener as soon as there is one.

        ``pager`` waits for its job, should the container be restored; there is one restore at most.
        """
        self._container = container
        self._runc = Runc(Path(container.runc), Path(container.runc_root), Path(container.criu))
        self._directory = Path(container.runtime)
        self._sink = sink
        self._on_network = on_network
        self._hook = Gate(self._directory, "hook")
        self._hook.write_hook()
        tmpfs.install(self._directory / "bin")
        self._stdio: Stdio | None = None
        self.pager: PagerProcess | LazyPages | None = pager
        self.network: Network | None = None
        self.pid = 0
        self.owner = 0
        """The host id of root inside: it gets the pipes of stdio, so that /dev/stderr can be opened again."""
        self.timeline: dict[str, float] = {}
        self._coming: asyncio.subprocess.Process | None = None
        self._dumping: asyncio.subprocess.Process | None = None
        self._doomed = False

    def _environment(self) -> dict[str, str]:
        return tmpfs.environment(self._runc.environment(), self._directory / "bin")

    async def boot(self) -> int:
        """``runc run``; returns the host pid of the container's init."""
        await self.drop_pager()
        return await self._bring_up(["run", "--detach"], wait_for_way_out=True)

    async def restore(self, job: RestoreJob) -> int:
        """``runc restore``; returns the host pid of the container's init, which by then has run for a while."""
        (self._directory / "criu.conf").write_text(job.options)
        arguments = ["restore", "--detach", "--image-path", job.images, "--work-path", job.work]
        arguments += ["--empty-ns", "network"]
        if job.pager is not None:
            await self._page(job.pager)
            arguments.append("--lazy-pages")
        else:
            await self.drop_pager()
        try:
            pid = await self._bring_up(arguments, wait_for_way_out=job.needs_network)
        finally:
            cgroup.keep_options()
        if cgroup.elsewhere(pid, self._container.cgroup) and not process.exiting(pid):
            process.send(pid, signal.SIGKILL)  # and with it all of its pid namespace
            raise EngineError(
                f"CRIU restored it outside of {self._container.cgroup}, where no limit holds",
                hint="please report this with the output of `relume doctor`",
            )
        if job.affinity:
            affinity.apply(cgroup.processes(self._container.cgroup), job.affinity)
        return pid

    async def _page(self, job: dict[str, Any]) -> None:
        if job.get("daemon") == DAEMON:
            await self.drop_pager()
            self.pager = await LazyPages.spawn(Path(self._container.criu), job)
        assert self.pager is not None
        self.pager.on_death = self._pager_died
        await self.pager.listen(job)
        self._mark("pager_ready")

    def _pager_died(self) -> None:
        """Pager and holder are gone, and with them the last descriptors: no page may be served as zeros."""
        cgroup.kill(self._container.cgroup)

    async def drop_pager(self) -> None:
        """End the pager, if there is one still, and take note of its end."""
        pager, self.pager = self.pager, None
        if pager is not None:
            await pager.close()

    async def _bring_up(self, arguments: list[str], *, wait_for_way_out: bool) -> int:
        pid_file = self._directory / "pid"
        log = self._directory / "runc.log"
        self._stdio = Stdio(self._sink, owner=self.owner)
        self._mark("runc_started")
        command = await asyncio.create_subprocess_exec(
            *_ALONE,
            *self._runc.argv(
                *arguments,
                *("--bundle", str(self._directory / "bundle"), "--pid-file", str(pid_file)),
                self._container.instance_id,
                log=log,
            ),
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._stdio.out,
            stderr=self._stdio.err,
            start_new_session=True,
        )
        self._stdio.hand_over()
        self._coming = command
        if self._doomed:
            self._end_coming()
        meeting = asyncio.create_task(self._meet_hook(wait_for_way_out))
        ending = asyncio.create_task(command.wait())
        try:
            await asyncio.wait({meeting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if meeting.done():
                meeting.result()
            code = await ending
        except BaseException:
            # Whatever went wrong at the meeting (a hung up node is not among it), nobody may wait for us.
            self._hook.release(ok=False)
            await ending
            raise
        finally:
            self._coming = None
            meeting.cancel()
        self._mark("runc_returned")
        if code != 0:
            _end_session(command)  # a CRIU that runc has left behind
            raise EngineError(_last_error(log) or f"runc {arguments[0]} ended with status {code}")
        self.pid = int(pid_file.read_text())
        return self.pid

    async def _meet_hook(self, wait_for_way_out: bool) -> None:
        """The namespaces exist, nothing of the container runs yet: make its network, then let runc go on."""
        state = json.loads(await self._hook.arrival())
        self._mark("namespaces")
        pid = int(state["pid"])
        self.network = Network(pid, sidecar=ADDRESS)
        listener = self.network.inside.run(lambda: netns.listener(ADDRESS, PORT, backlog=512))
        await self._on_network(listener)
        if self._container.outgoing:
            way_out = self._open_way_out(pid)
            if wait_for_way_out:
                await way_out
            else:
                self._way_out = asyncio.create_task(way_out)
        self._hook.release()
        self._mark("network")

    def resume(self, stopped: Collection[int]) -> None:
        """Let a container that was restored stopped run, but for the processes with pids inside ``stopped``."""
        for pid in cgroup.processes(self._container.cgroup):
            if process.inner_pid(pid) not in stopped:
                process.send(pid, signal.SIGCONT)

    async def dump(self, job: DumpJob) -> DumpResult:
        """``runc checkpoint --leave-running``, held files copied while all is frozen. Never raises for CRIU."""
        started = time.monotonic()
        gate = Gate(self._directory, "post-dump")
        code = -1
        try:
            gate.write_action_script("post-dump")
            (self._directory / "criu.conf").write_text(job.options)
            command = await asyncio.create_subprocess_exec(
                *_ALONE,
                *self._runc.argv(
                    *("checkpoint", "--leave-running", "--image-path", job.images, "--work-path", job.work),
                    *("--empty-ns", "network", self._container.instance_id),
                    log=Path(job.work) / "runc.log",
                ),
                env=self._environment() | {"CRIU_FAULT": _INTERRUPT_ONLY},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            copying = asyncio.create_task(self._copy_held(gate, job))
            late = asyncio.create_task(self._thaw_after(job.timeout, command))
            killed = asyncio.create_task(self._end_when_killed(command))
            self._dumping = command
            code = await command.wait()
            if code != 0:
                self._end_dump(command)  # a CRIU that runc has left behind
            too_slow = late.done()
            late.cancel()
            victim = killed.result() if killed.done() else ""
            killed.cancel()
            if code != 0 and not copying.done():
                copying.cancel()
            result = await asyncio.gather(copying, return_exceptions=True)
        finally:
            self._dumping = None
            gate.close()
            await asyncio.to_thread(self._let_go, mend=code != 0)
            cgroup.keep_options()
        dumped = self._dump_result(job, code, result[0], time.monotonic() - started)
        if too_slow and dumped.error:
            dumped = dataclasses.replace(dumped, error=f"it was not done within {job.timeout:.0f} s")
        return dataclasses.replace(dumped, killed="" if dumped.app_gone else victim)

    def _let_go(self, *, mend: bool) -> None:
        """Whatever became of CRIU: nothing of the app is frozen, and its connections are as they were."""
        if mend:
            for pid in cgroup.processes(self._container.cgroup):
                tcp.end_repair(pid)
        cgroup.thaw(self._container.cgroup)

    async def _copy_held(self, gate: Gate, job: DumpJob) -> _Copied:
        await gate.arrival()
        started = time.monotonic()
        abandoned = threading.Event()
        try:
            pids = cgroup.processes(self._container.cgroup)
            copying = asyncio.ensure_future(
                asyncio.to_thread(
                    held.capture,
                    pids,
                    upper=Path(job.upper),
                    rootfs=self._directory / "rootfs",
                    dest=Path(job.held),
                    id_base=job.id_base,
                    limit_bytes=job.held_limit,
                    everything=job.everything,
                    also=job.also,
                    abandoned=abandoned.is_set,
                )
            )
            try:
                report = await asyncio.shield(copying)
            except asyncio.CancelledError:
                abandoned.set()
                # Or it would go on below the hands of who clears up.
                await asyncio.gather(copying, return_exceptions=True)
                raise
            pinned = affinity.read(pids)
        except BaseException:
            gate.release(ok=False)  # fails the dump, and CRIU lets the tasks go on
            raise
        gate.release()
        return _Copied(report, pinned, time.monotonic() - started)

    async def _thaw_after(self, timeout: float, command: asyncio.subprocess.Process) -> None:
        """The watchdog: past ``timeout`` seconds the app runs again, dump or no dump."""
        await asyncio.sleep(timeout)
        self._end_dump(command)

    async def _end_when_killed(self, command: asyncio.subprocess.Process) -> str:
        """End a dump in which a process was killed; returns which. CRIU would wait for it for ever.

        It waits for the process ("Waiting for N to trap"), whose end the kernel does not tell before CRIU has
        taken note of each of its threads. For the same reason neither its parent nor a pidfd hears of that end,
        so /proc is looked at. The others go on: CRIU's code in them leaves when its socket to CRIU closes.
        """
        seen = {self.pid}  # one that is killed at once is in no list of the group any more
        waited_for: set[int] = set()
        while True:
            seen.update(cgroup.processes(self._container.cgroup))  # which lists no dead ones
            await asyncio.sleep(_KILLED_PAUSE)
            dead = {pid for pid in seen if process.exiting(pid) and process.traced(pid)}
            if both := dead & waited_for:  # CRIU takes note by itself, mostly
                pid = min(both)
                victim = f"{process.name(pid)} (pid {process.inner_pid(pid)})"
                break
            waited_for = dead
        self._end_dump(command)
        return victim

    def _end_dump(self, command: asyncio.subprocess.Process) -> None:
        """End CRIU. Frozen first, for no process may touch a connection before :meth:`_let_go` has been there."""
        cgroup.freeze(self._container.cgroup)
        _end_session(command)

    def _dump_result(
        self, job: DumpJob, code: int, copied: _Copied | BaseException, seconds: float
    ) -> DumpResult:
        gone = process.exiting(self.pid)
        if isinstance(copied, Unsupported):
            return DumpResult(
                job.dump_id,
                error=copied.message,
                culprits=list(copied.details.get("culprits", ()))
                or [{"what": copied.message, "hint": copied.hint}],
                app_gone=gone,
            )
        if code != 0:
            error = _last_error(Path(job.work) / "runc.log") or f"runc checkpoint ended with status {code}"
            if isinstance(copied, Exception):
                error = f"copying held files: {copied}"  # it is what failed the dump
            no_space = isinstance(copied, OSError) and copied.errno == errno.ENOSPC
            return DumpResult(job.dump_id, error=error, no_space=no_space, app_gone=gone, seconds=seconds)
        if isinstance(copied, BaseException):
            return DumpResult(job.dump_id, error=f"copying held files: {copied}", app_gone=gone)
        return DumpResult(
            job.dump_id,
            seconds=seconds,
            copy_seconds=copied.seconds,
            held=dataclasses.asdict(copied.report),
            affinity=copied.affinity,
            app_gone=gone,
        )

    async def ended(self) -> int:
        """Wait for the container's init; returns its exit code, or 128 + the signal that ended it."""
        await process.ended(self.pid)
        _, status = await asyncio.to_thread(os.waitpid, self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if self._stdio is not None:
            await self._stdio.drained(1.0)
        return 128 - code if code < 0 else code

    async def kill(self) -> None:
        """End the container, or a boot, restore or dump that is going on; who waits for these hears of it."""
        self._doomed = True
        self._end_coming()
        if self._dumping is not None:
            _end_session(self._dumping)  # it would wait for ever for the end of what it has hold of
        await asyncio.to_thread(cgroup.kill, self._container.cgroup)

    def _end_coming(self) -> None:
        """runc, the CRIU and the hook it runs: a session of their own. The cgroup holds the container's part."""
        if self._coming is not None:
            _end_session(self._coming)

    async def close(self) -> None:
        """End what is left of it: stray processes, pasta, the hook's FIFOs."""
        await asyncio.to_thread(cgroup.kill, self._container.cgroup)
        await self.drop_pager()
        if self.network is not None:
            await self.network.close()
        self._hook.close()

    async def _open_way_out(self, pid: int) -> None:
        assert self.network is not None
        if await self.network.open_way_out(pid, self._directory / "pasta.log"):
            self._mark("way_out")

    def _mark(self, stage: str) -> None:
        self.timeline[stage] = time.monotonic()


def _end_session(command: asyncio.subprocess.Process) -> None:
    """SIGKILL a command that was started with a session of its own, and what it runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(command.pid, signal.SIGKILL)


def _last_error(log: Path) -> str:
    """The last error line of a runc log in JSON, without its level and time."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("level") in ("error", "fatal"):
            return str(entry.get("msg", "")).strip()
    return ""
