"""``dockerfile_path``: the image that a Dockerfile describes, by buildah, without a daemon.

The build context is what ``include`` and ``exclude`` leave of the app's directory. ``FROM debian:...`` and ``FROM
ubuntu:...`` get the same base that apps without a Dockerfile get, so they work where no registry answers. RUN steps
see the host's package-client settings as other builds do, and the image keeps none of them.

buildah's own storage lies in the build's scratch directory and goes with it; steps are not cached one by one,
the image as a whole is, by the Dockerfile and its context.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

from relume.build import apt, command, image
from relume.build.command import Progress
from relume.build.depot import Depot, Made
from relume.build.files import AppFiles
from relume.build.interrupt import in_thread
from relume.build.sandbox import SUPPORT
from relume.errors import BuildError
from relume.runc import Mount

_FROM = re.compile(r"^\s*FROM\s+(?:--\S+\s+)*(?P<image>\S+)", re.IGNORECASE | re.MULTILINE)

_STANDARD = frozenset("/ /dev /etc /home /mnt /opt /proc /root /run /srv /sys /tmp /usr /var".split())

_NAME = "localhost/relume-build"


async def make(
    dockerfile: str,
    files: AppFiles,
    binds: list[Mount],
    env: Mapping[str, str],
    base: Callable[[str], Awaitable[Made]],
    depot: Depot,
    workspace: Path,
    progress: Progress,
) -> Made:
    """Build the image and unpack it into a layer. ``base`` makes a well-known distribution's base.

    Facts are those of ``base.make``. Raises BuildError.
    """
    context = workspace / "context"
    context.mkdir()
    await in_thread(lambda check: files.copy(context, check))
    text = _text(context, dockerfile)
    progress(f"dockerfile: {dockerfile}, by buildah")
    tool = _Buildah(workspace / "buildah", context, progress)
    for name in dict.fromkeys(match["image"] for match in _FROM.finditer(text)):
        if apt.known(name):
            await tool.provide(name, await base(name))
    described = workspace / "Dockerfile"
    described.write_text(with_arguments(text, env))
    await tool.build(dockerfile, described, files.root / ".dockerignore", binds, env)
    layout = workspace / "layout"
    await tool.push(layout)
    rootfs, config, digest = await image.unpack(layout, workspace / "bundle", progress)
    await in_thread(lambda check: remove_mount_points(rootfs, [mount.destination for mount in binds]))
    layer = await depot.publish(rootfs)
    return Made(layer, {"config": config.as_dict(), "base": f"{dockerfile} ({digest})"})


def _text(context: Path, dockerfile: str) -> str:
    try:
        return (context / dockerfile).read_text(errors="replace")
    except OSError as error:
        raise BuildError(
            f"{dockerfile}: cannot be read: {error.strerror}",
            hint="dockerfile_path is relative to the app's directory, and `include` and `exclude` must leave it in",
        ) from error


def with_arguments(text: str, names: Iterable[str]) -> str:
    """The Dockerfile with an ARG for each name after every FROM.

    A build argument is in the environment of RUN steps and in nothing that the image keeps, which is right for
    settings of the host (buildah's ``--env`` is the opposite: kept, and not seen by RUN).
    """
    arguments = "".join(f"ARG {name}\n" for name in names)
    lines = text.splitlines(keepends=True)
    return "".join(
        line.rstrip("\n") + "\n" + arguments
        if _FROM.match(line) and not line.rstrip().endswith("\\")
        else line
        for line in lines
    )


def remove_mount_points(rootfs: Path, destinations: Iterable[str]) -> None:
    """Remove what buildah made in the image to mount on: empty files and directories, and their empty parents."""
    for destination in [*destinations, "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"]:
        path = Path(destination)
        while str(path) not in _STANDARD:
            place = rootfs / path.relative_to("/")
            try:
                if place.is_symlink():
                    break
                if place.is_dir():
                    place.rmdir()
                elif place.is_file() and place.stat().st_size == 0:
                    place.unlink()
            except OSError:  # not empty, so not only a mount point
                break
            path = path.parent


class _Buildah:
    """One storage of buildah's and the commands on it."""

    def __init__(self, directory: Path, cwd: Path, progress: Progress) -> None:
        self._cwd = cwd
        self._progress = progress
        self._prefix = [
            "buildah",
            *("--root", str(directory / "storage"), "--runroot", str(directory / "run")),
            *("--storage-driver", "overlay"),
        ]
        scratch = directory / "tmp"
        scratch.mkdir(parents=True)
        self._env = {**os.environ, "TMPDIR": str(scratch), "BUILDAH_ISOLATION": "chroot"}

    async def _run(self, *arguments: str, what: str, env: Mapping[str, str] | None = None) -> str:
        return await command.run(
            [*self._prefix, *arguments],
            what=what,
            env=self._env | dict(env or {}),
            cwd=self._cwd,
            progress=self._progress,
        )

    async def provide(self, name: str, made: Made) -> None:
        """Make a layer of ours known as the image ``name``."""
        what = f"giving buildah the base {name}"
        container = (await self._run("from", "scratch", what=what)).strip()
        await self._run("add", "--quiet", container, str(made.layer.path), "/", what=what)
        await self._run(
            "config", "--cmd", "bash", "--env", f"PATH={image.DEFAULT_PATH}", container, what=what
        )
        full = name if "/" in name else f"docker.io/library/{name}"
        await self._run("commit", "--quiet", "--rm", container, full, what=what)

    async def build(
        self, name: str, dockerfile: Path, ignore: Path, binds: list[Mount], env: Mapping[str, str]
    ) -> None:
        volumes = [_volume(mount) for mount in binds]
        # The host's own settings may hold passwords, so they come from the environment and not from argv. Ours are
        # places inside, which buildah must not take for its own (SSL_CERT_FILE).
        kept = {name: value for name, value in env.items() if value.startswith(SUPPORT)}
        secret = {name: value for name, value in env.items() if name not in kept}
        arguments = [
            *("bud", "--isolation", "chroot", "--layers=false", "--pull=false", "--format", "oci"),
            *("--identity-label=false", "--network", "host"),
            *(part for volume in volumes for part in ("--volume", volume)),
            *(part for name in kept for part in ("--build-arg", f"{name}={kept[name]}")),
            *(part for name in secret for part in ("--build-arg", name)),
            *(("--ignorefile", str(ignore)) if ignore.is_file() else ()),
            *("-f", str(dockerfile), "-t", _NAME, str(self._cwd)),
        ]
        await self._run(*arguments, what=f"building {name}", env=secret)

    async def push(self, layout: Path) -> None:
        await self._run(
            "push",
            "--quiet",
            "--disable-compression",
            _NAME,
            f"oci:{layout}:image",
            what="reading buildah's image",
        )


def _volume(mount: Mount) -> str:
    suffix = ":ro" if "ro" in mount.options else ""
    return f"{mount.source}:{mount.destination}{suffix}"
