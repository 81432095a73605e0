"""The build container: an overlay of finished layers and one new one, in which commands run.

The container is runc's, with Docker's default capabilities and seccomp rules, its own pid, mount, ipc and uts
namespaces, and the host's network. It has no user namespace: what it writes must be owned from 0, as layers
are. A build is therefore as trusted as whoever may deploy.

Nothing of the way it was run stays in the new layer: ``/tmp``, ``/run`` and ``/dev`` are mounts, what settings
need is mounted read-only, and mount points that had to be made for that are removed again.

Guarantees: leaving the context, by success, error or cancellation, ends every process of the container and
removes its mounts and control groups.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from relume.build import command
from relume.build.command import Progress
from relume.build.interrupt import to_the_end
from relume.build.model import Layer
from relume.errors import EngineError, HostError
from relume.linux import cgroup, mounts
from relume.runc import Mount, Runc, Spec, find_runc

SUPPORT = "/run/relume-build"
"""Where the host's settings and tools appear inside; below /run, which is a mount and never part of a layer."""

_OPTIONS = "index=off,redirect_dir=off,metacopy=off"
"""Plain overlay layers: no reference from the new layer to the ones it was made over."""

_READ_ONLY = ("rbind", "rprivate", "ro")


@dataclasses.dataclass(frozen=True, slots=True)
class Sandbox:
    """An open build container. ``merged`` is its root as the host sees it, ``upper`` the new layer."""

    directory: Path
    runc: Runc
    group: str
    """The control group that holds those of this build's containers."""
    progress: Progress

    @property
    def upper(self) -> Path:
        return self.directory / "upper"

    @property
    def merged(self) -> Path:
        return self.directory / "merged"

    async def run(
        self,
        argv: Sequence[str],
        *,
        what: str,
        env: Mapping[str, str],
        cwd: str = "/",
        binds: Sequence[Mount] = (),
        show: Progress | None = None,
    ) -> str:
        """Run one command as root inside, to its end; returns its standard output.

        Both streams go to ``show`` (default: the build's progress). Raises BuildError when it fails.
        """
        name = f"relume-build-{uuid.uuid4().hex[:16]}"
        bundle = self.directory / name
        spec = Spec(
            rootfs=self.merged,
            argv=argv,
            env=env,
            cwd=cwd,
            hostname="build",
            cgroup=f"{self.group}/{name}",
            id_base=None,
            mounts=[*self._own_mounts(), *binds],
            host_network=True,
        )
        made = _mount_points_to_make(self.merged, [mount.destination for mount in spec.mounts])
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(spec.as_dict()))
        try:
            return await self._run(name, bundle, argv, what, show or self.progress)
        finally:
            _remove_mount_points(made)

    def _own_mounts(self) -> list[Mount]:
        tmp = self.directory / "tmp"
        if not tmp.exists():
            tmp.mkdir()
            tmp.chmod(0o1777)
        return [
            Mount("/run", "tmpfs", "tmpfs", ("nosuid", "nodev", "mode=755")),
            Mount("/tmp", str(tmp), "bind", ("rbind", "rprivate")),
        ]

    async def _run(self, name: str, bundle: Path, argv: Sequence[str], what: str, show: Progress) -> str:
        log = bundle / "runc.log"
        process = await asyncio.create_subprocess_exec(
            *self.runc.argv("run", "--bundle", str(bundle), name, log=log),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout and process.stderr
        tail: deque[str] = deque(maxlen=command.TAIL_LINES)
        output: list[str] = []
        keep = command.tee(tail, show)

        def stdout(line: str) -> None:
            output.append(line)
            keep(line)

        try:
            await asyncio.gather(command.pump(process.stdout, stdout), command.pump(process.stderr, keep))
            status = await process.wait()
        finally:
            await to_the_end(self._end(name, process))
        if status:
            if not tail and (said := _last_error(log)):
                raise EngineError(f"{what}: runc could not start the build container: {said}")
            raise command.failure(what, argv, status, list(tail))
        return "".join(f"{line}\n" for line in output)

    async def _end(self, name: str, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await _delete(self.runc, name)
        group = f"{self.group}/{name}"
        await asyncio.to_thread(cgroup.kill, group)
        await asyncio.to_thread(cgroup.remove, group)


async def _delete(runc: Runc, name: str) -> None:
    """Kill and forget a container, whatever state it is in; one that does not exist is fine."""
    delete = await asyncio.create_subprocess_exec(
        *runc.argv("delete", "--force", name),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await delete.wait()


def _runc(workspace: Path) -> Runc:
    return Runc(find_runc(), workspace / "runc")


def group_prefix(root: Path) -> str:
    """How the control groups of builds begin whose scratch directories lie below ``root``; another node's differ."""
    return f"/relume-build-{blake3(os.fsencode(root)).hexdigest()[:8]}-"


def _group(workspace: Path) -> str:
    return group_prefix(workspace.parent) + workspace.name


async def end_all(workspace: Path) -> None:
    """End every build container of a scratch directory, whoever started it, and remove its control groups."""
    state = workspace / "runc"
    if state.is_dir():
        runc = _runc(workspace)
        for container in sorted(state.iterdir()):
            await _delete(runc, container.name)
    await asyncio.to_thread(cgroup.kill, _group(workspace))
    await asyncio.to_thread(cgroup.remove, _group(workspace))


@contextlib.asynccontextmanager
async def sandbox(workspace: Path, layers: Sequence[Layer], progress: Progress) -> AsyncIterator[Sandbox]:
    """A build container over ``layers`` (lowest first). After the context ``upper`` is unmounted and whole."""
    directory = workspace / f"sandbox-{uuid.uuid4().hex[:8]}"
    box = Sandbox(directory, _runc(workspace), _group(workspace), progress)
    work = box.directory / "work"
    for path in (box.directory, box.upper, box.merged, work):
        path.mkdir()
    box.upper.chmod(0o755)
    lower = [layer.path for layer in layers]
    try:
        mounts.overlay(lower, box.upper, work, box.merged, options=_OPTIONS)
    except OSError as error:
        raise HostError(
            f"no overlay can be mounted in {workspace}: {error.strerror}",
            hint="the state directory must lie on ext4, xfs, btrfs or tmpfs, and its path hold no colon or comma",
        ) from error
    try:
        yield box
    finally:
        mounts.unmount_all(box.merged)


def _mount_points_to_make(root: Path, destinations: Sequence[str]) -> list[Path]:
    """The paths below ``root`` that runc will have to create for these mounts, parents first."""
    missing: dict[Path, None] = {}
    for destination in destinations:
        path = root
        for part in Path(destination).parts[1:]:
            path = path / part
            if path.is_symlink():
                # runc resolves it inside the root; what it makes there is found by resolving it the same way.
                path = root / os.path.realpath(path).removeprefix(str(root)).lstrip("/")
            if not path.exists():
                missing.setdefault(path)
    return list(missing)


def _remove_mount_points(paths: Sequence[Path]) -> None:
    for path in reversed(paths):
        with contextlib.suppress(OSError):  # not made, or used by the command for something of its own
            if path.is_dir():
                path.rmdir()
            elif path.is_file() and path.stat().st_size == 0:
                path.unlink()


def read_only(source: Path, destination: str | None = None) -> Mount:
    """A read-only bind of a host path, at the same place inside unless said otherwise."""
    return Mount(destination or str(source), str(source), "bind", _READ_ONLY)


def writable(source: Path, destination: str) -> Mount:
    """A bind that commands may write to; what they write is not part of the layer."""
    return Mount(destination, str(source), "bind", ("rbind", "rprivate"))


def _last_error(log: Path) -> str:
    try:
        lines = log.read_text().splitlines()
        return str(json.loads(lines[-1])["msg"]) if lines else ""
    except (OSError, ValueError, KeyError):
        return ""
