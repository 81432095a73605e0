"""The stages of a build, lowest first, each a layer that is found again by what went into it.

::

    base      what docker_base_image_url or dockerfile_path names
    system    pre_build_commands, then apt packages
    python    interpreter, virtual environment, pip packages
    guest     relume's SDK and runner
    app       the app's files at /cortex
    commands  shell_commands, in /cortex

A stage's key is the layers below it and its own inputs. A stage that changes nothing has no layer. Dockerfile
apps have base and guest only: their image is complete.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from relume.build import apt, dockerfile, guest, image, python, settle
from relume.build import base as bases
from relume.build.command import Progress
from relume.build.depot import Depot, Made
from relume.build.image import ImageConfig
from relume.build.interrupt import in_thread
from relume.build.model import Layer
from relume.build.plan import Plan, key_of
from relume.build.sandbox import SUPPORT, Sandbox, read_only, sandbox, writable
from relume.build.settings import Settings
from relume.errors import BuildError
from relume.runc import Mount

WORKDIR = "/cortex"

Work = Callable[[Sandbox], Awaitable[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What the stages gave: the layers, lowest first, and how the app is run on them."""

    layers: tuple[Layer, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    user: str
    facts: Mapping[str, Any]


class Run:
    """One run through the stages. ``fresh`` makes base, dependencies and commands anew."""

    def __init__(
        self,
        depot: Depot,
        workspace: Path,
        plan: Plan,
        added: guest.Guest,
        settings: Settings,
        fresh: bool,
        progress: Progress,
    ) -> None:
        self._depot = depot
        self._workspace = workspace
        self._plan = plan
        self._added = added
        self._settings = settings
        self._fresh = fresh
        self._progress = progress
        self._layers: list[Layer] = []
        self._facts: dict[str, Any] = {}
        self._image = ImageConfig()
        self._env: dict[str, str] = {}
        self._binds: list[Mount] = []

    async def make(self) -> Result:
        """All stages. Raises BuildError, HostError or EngineError."""
        plan = self._plan
        self._take(await (self._dockerfile() if plan.dockerfile else self._base(plan.base)))
        self._image = ImageConfig.from_dict(self._facts.pop("config"))
        self._prepare_environment()
        if plan.dockerfile:
            await self._guest()
            return self._result(self._image.working_dir or "/", {"PYTHONPATH": self._python_path()})
        await self._system()
        await self._python()
        await self._guest()
        await self._app()
        await self._commands()
        return self._result(WORKDIR, self._venv())

    # --- the stages ---------------------------------------------------------------------------------

    async def _base(self, name: bases.BaseName | None) -> Made:
        assert name is not None

        async def make() -> Made:
            return await bases.make(name, self._depot, self._scratch("base"), self._progress)

        return await self._stage("base", name.identity, make, fresh=self._fresh)

    async def _dockerfile(self) -> Made:
        plan = self._plan
        assert plan.dockerfile is not None
        if plan.requirements or plan.apt or plan.pre_build_commands or plan.shell_commands:
            self._progress(
                "dockerfile: it makes the whole image; dependency tables and commands are not applied"
            )
        self._prepare_environment()
        inherited = {name: value for name, value in self._env.items() if name not in ("PATH", "HOME")}

        async def known(name: str) -> Made:
            return await self._base(await bases.identify(name, plan.files.root))

        async def make() -> Made:
            return await dockerfile.make(
                plan.dockerfile or "",
                plan.files,
                self._binds,
                inherited,
                known,
                self._depot,
                self._scratch("dockerfile"),
                self._progress,
            )

        return await self._stage("image", [plan.dockerfile, plan.files.digest], make, fresh=self._fresh)

    async def _system(self) -> None:
        plan = self._plan
        if not plan.apt and not plan.pre_build_commands:
            return

        async def work(box: Sandbox) -> Mapping[str, Any]:
            await self._shell(box, plan.pre_build_commands, "pre_build_commands", "/")
            return {"apt": await self._install_apt(box)} if plan.apt else {}

        await self._layer("system", [plan.apt, plan.pre_build_commands], work, fresh=self._fresh)

    async def _install_apt(self, box: Sandbox) -> dict[str, str]:
        packages = self._plan.apt
        self._progress(f"apt: installing {' '.join(packages)}")
        script = 'apt-get update -q && exec apt-get install -q -y --no-install-recommends "$@"'
        await box.run(
            ["/bin/sh", "-c", script, "apt", *packages],
            what="installing apt packages",
            env=self._env,
            binds=self._binds,
        )
        names = [package.partition("=")[0] for package in packages]
        # apt-get also takes names that dpkg has not: of virtual packages (libz-dev). What came in their place
        # is not listed, which is no reason to fail.
        listing = 'dpkg-query -W -f "$0" "$@" || true'
        answer = await box.run(
            ["/bin/sh", "-c", listing, "${Package} ${Version}\\n", *names],
            what="listing installed packages",
            env=self._env,
            show=lambda line: None,
        )
        listed = (line.partition(" ") for line in answer.splitlines())
        return {package: version for package, _, version in listed if version}

    async def _python(self) -> None:
        plan = self._plan
        needs = plan.requirements
        inputs = [
            *(plan.python_version, plan.needs_python, plan.use_uv, needs.lines, dict(needs.files)),
            plan.files.digest if needs.local else None,
        ]

        async def work(box: Sandbox) -> Mapping[str, Any]:
            app = None
            if needs.local:
                app = box.directory / "app"
                app.mkdir()
                await in_thread(lambda check: plan.files.copy(app, check))
            return await python.install(box, plan, self._env, self._binds, app)

        await self._layer("python", inputs, work, fresh=self._fresh)

    async def _guest(self) -> None:
        async def work(box: Sandbox) -> Mapping[str, Any]:
            await in_thread(lambda check: guest.add(box.merged, self._added, check))
            await self._compile(box, guest.PLACE)
            return {}

        await self._layer("guest", self._added.digest, work)

    async def _app(self) -> None:
        files = self._plan.files
        self._progress(f"app: {files.count} files, {files.size / 1e6:.1f} MB")

        async def work(box: Sandbox) -> Mapping[str, Any]:
            place = box.merged / WORKDIR.lstrip("/")
            place.mkdir(exist_ok=True)
            await in_thread(lambda check: files.copy(place, check))
            if any(entry.path.endswith(".py") for entry in files.entries):
                await self._compile(box, WORKDIR)
            return {}

        await self._layer("app", files.digest, work)

    async def _commands(self) -> None:
        commands = self._plan.shell_commands
        if not commands:
            return

        async def work(box: Sandbox) -> Mapping[str, Any]:
            await self._shell(box, commands, "shell_commands", WORKDIR)
            return {}

        await self._layer("commands", commands, work, fresh=self._fresh)

    # --- their common parts -------------------------------------------------------------------------

    async def _stage(
        self, kind: str, inputs: object, make: Callable[[], Awaitable[Made]], *, fresh: bool = False
    ) -> Made:
        """What this stage gave before, else what ``make`` gives now; only one builder makes it."""
        key = key_of([kind, inputs, [layer.digest for layer in self._layers]])
        async with self._depot.lock(f"stage-{kind}-{key[:2]}"):
            known = None if fresh else self._depot.lookup(kind, key)
            if known is None:
                known = await make()
                self._depot.record(kind, key, known)
            return known

    async def _layer(self, kind: str, inputs: object, work: Work, *, fresh: bool = False) -> None:
        """A stage whose layer is what ``work`` writes in a build container over the layers so far."""

        async def make() -> Made:
            started = time.time()
            async with sandbox(self._workspace, self._layers, self._progress) as box:
                facts = await work(box)
            lowers = [layer.path for layer in self._layers]
            await in_thread(lambda check: settle.settle(box.upper, lowers, since=started, check=check))
            return Made(await self._depot.publish(box.upper), facts)

        self._take(await self._stage(kind, inputs, make, fresh=fresh))

    def _take(self, made: Made) -> None:
        if any(made.layer.path.iterdir()):
            self._layers.append(made.layer)
        self._facts |= made.facts

    async def _shell(self, box: Sandbox, commands: Iterable[str], what: str, cwd: str) -> None:
        env = {**self._env, **self._venv()}
        for command in commands:
            self._progress(f"{what}: {command}")
            await box.run(["/bin/sh", "-c", command], what=what, env=env, cwd=cwd, binds=self._binds)

    async def _compile(self, box: Sandbox, directory: str) -> None:
        if self._has_venv():
            await python.compile_bytecode(box, self._env, directory)

    def _scratch(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._workspace))

    # --- environments -------------------------------------------------------------------------------

    def _prepare_environment(self) -> None:
        """Variables and mounts of build commands, once the base (and so its apt sources) is known."""
        support = self._workspace / "support"
        for name in ("apt/lists/partial", "apt/cache/archives/partial"):
            (support / name).mkdir(parents=True, exist_ok=True)
        (support / "apt.conf").write_text(self._settings.apt + self._apt_sources(support))
        cache = self._depot.root / "cache" / self._plan.app
        cache.mkdir(parents=True, exist_ok=True)
        hosts = [path for path in (Path("/etc/hosts"), Path("/etc/resolv.conf")) if path.is_file()]
        self._binds = [
            *(read_only(path.resolve(), str(path)) for path in hosts),
            *self._settings.mounts,
            read_only(support / "apt.conf", f"{SUPPORT}/apt.conf"),
            writable(support / "apt", f"{SUPPORT}/apt"),
            writable(cache, f"{SUPPORT}/cache"),
        ]
        self._env = {
            "PATH": image.DEFAULT_PATH,
            "HOME": "/root",
            **self._image.env,
            **self._settings.env,
            "APT_CONFIG": f"{SUPPORT}/apt.conf",
            "DEBIAN_FRONTEND": "noninteractive",
            "PIP_CACHE_DIR": f"{SUPPORT}/cache/pip",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
            "UV_CACHE_DIR": f"{SUPPORT}/cache/uv",
            "UV_LINK_MODE": "copy",
        }

    def _apt_sources(self, support: Path) -> str:
        """Lines of apt.conf(5) that put the host's mirrors in place of the base's public ones."""
        release = apt.release_of(self._layers[0].path) if self._layers else None
        if release is None:
            return ""
        sources = apt.sources_for(release)
        if apt.is_public(sources, release):
            return ""
        (support / "apt/sources.list").write_text("\n".join(apt.lines(sources)) + "\n")
        return f'Dir::Etc::sourcelist "{SUPPORT}/apt/sources.list";\nDir::Etc::sourceparts "-";\n'

    def _has_venv(self) -> bool:
        return any((layer.path / python.VENV.lstrip("/")).is_dir() for layer in self._layers)

    def _venv(self) -> dict[str, str]:
        if not self._has_venv():
            return {}
        path = self._image.env.get("PATH") or image.DEFAULT_PATH
        return {"PATH": f"{python.VENV}/bin:{path}", "VIRTUAL_ENV": python.VENV}

    def _python_path(self) -> str:
        own = self._image.env.get("PYTHONPATH")
        return f"{own}:{guest.PLACE}" if own else guest.PLACE

    def _result(self, cwd: str, env: Mapping[str, str]) -> Result:
        argv = self._plan.entrypoint or (*self._image.entrypoint, *self._image.cmd)
        if not argv:
            raise BuildError(
                "the image names no command to run",
                hint="set entrypoint in [cerebrium.runtime.custom], or ENTRYPOINT or CMD in the Dockerfile",
            )
        accounts = next(
            (layer.path for layer in reversed(self._layers) if (layer.path / "etc/passwd").is_file()),
            self._layers[0].path if self._layers else Path("/nonexistent"),
        )
        user = image.find_user(accounts, self._image.user)
        return Result(
            layers=tuple(self._layers),
            argv=tuple(argv),
            env={
                "PATH": image.DEFAULT_PATH,
                "HOME": image.find_home(accounts, user),
                # A buffer full of output would be part of the checkpoint, and appear once in every copy.
                "PYTHONUNBUFFERED": "1",
                **self._image.env,
                **env,
            },
            cwd=cwd,
            user=user,
            facts=self._facts,
        )
