"""The builder: from an app's directory to a build, and the builds that are there.

Guarantees: a build is complete or not there. A failed or cancelled one leaves no process, mount, control group or
file but finished layers, which the next one uses. What a killed process left is removed by ``clean``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relume.build import base as bases
from relume.build import files as app_files
from relume.build import guest, travel
from relume.build import plan as plans
from relume.build.command import Progress
from relume.build.depot import Depot
from relume.build.interrupt import in_thread, to_the_end
from relume.build.model import Build
from relume.build.plan import Plan
from relume.build.sandbox import end_all
from relume.build.settings import gather
from relume.build.stages import Result, Run
from relume.config import AppConfig
from relume.errors import BuildError, NotFound


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """A build before it is made: everything it will be made of."""

    plan: Plan
    config: AppConfig
    added: guest.Guest

    @property
    def app(self) -> str:
        return self.plan.app

    @property
    def inputs(self) -> str:
        """Digest of all inputs, 64 hex digits."""
        return self.plan.inputs_digest


class Builder:
    """Makes and keeps the builds below ``root`` (see ``depot`` for what lies there). Needs root."""

    def __init__(self, root: Path) -> None:
        self._depot = Depot(root.resolve())

    async def build(
        self, app_dir: Path, config: AppConfig, *, fresh: bool = False, progress: Progress = print
    ) -> Build:
        """Build the app in ``app_dir``, or find the build that the same inputs gave before: ``plan`` and ``make``."""
        build, _ = await self.make(await self.plan(app_dir, config), fresh=fresh, progress=progress)
        return build

    async def plan(self, app_dir: Path, config: AppConfig) -> Planned:
        """Read what the app in ``app_dir`` is to be made of. Raises BuildError."""
        added = guest.for_app(config)
        return Planned(await self._plan(app_dir, config, added), config, added)

    async def make(
        self,
        planned: Planned,
        *,
        fresh: bool = False,
        taken: Collection[str] = (),
        progress: Progress = print,
    ) -> tuple[Build, bool]:
        """The build, and whether it was there: the newest that the same inputs gave here.

        ``fresh`` makes base and dependencies anew, and always gives a build of its own, whose id is none of
        ``taken``. ``progress`` gets lines for people; those that begin with two spaces are output of commands.
        Raises BuildError, HostError or EngineError.
        """
        started = time.monotonic()
        plan, config, added = planned.plan, planned.config, planned.added
        inputs = plan.inputs_digest
        async with self._depot.lock("builds", shared=True), self._depot.lock(f"build-{inputs[:2]}"):
            if not fresh and (known := self._depot.newest(inputs)):
                progress(f"build {known.build_id}: nothing changed, reused")
                return self._refreshed(known, config), True
            with self._depot.workspace() as workspace:
                settings = gather(os.environ, Path.home())
                try:
                    made = await Run(self._depot, workspace, plan, added, settings, fresh, progress).make()
                finally:
                    await to_the_end(end_all(workspace))
            build = self._assemble(plan, config, made, taken if fresh else None)
            await self._depot.make_durable()
            self._depot.save(build)
        progress(f"build {build.build_id}: {len(build.layers)} layers in {time.monotonic() - started:.1f} s")
        return build, False

    async def adopt(
        self,
        planned: Planned,
        facts: Mapping[str, Any],
        digests: Sequence[str],
        fetch: Callable[[str, Path], None],
    ) -> tuple[Build, bool]:
        """Take over a build that another node made of the same inputs; as ``make``, whether it was there.

        ``facts`` are its ``facts_of``. ``fetch(digest, directory)`` lays a layer into a directory; it is called
        in threads, for several layers at once, and only for those that are not here. Raises Untrusted for a
        build of other inputs or a layer of another digest, and what ``fetch`` raises; then nothing is changed.
        """
        build = travel.build_of(facts, digests, planned.plan, planned.config, self._depot.layers)
        stages = travel.stages_of(facts, build)
        inputs = build.inputs_digest
        async with self._depot.lock("builds", shared=True), self._depot.lock(f"build-{inputs[:2]}"):
            if there := self._depot.load(build.build_id) is not None:
                build = dataclasses.replace(build, created_at=self.load(build.build_id).created_at)
            with self._depot.workspace() as workspace:
                missing = {layer.digest for layer in build.layers if not layer.path.is_dir()}
                came = await asyncio.gather(
                    *(self._bring(digest, workspace / digest, fetch) for digest in missing),
                    return_exceptions=True,
                )
                for error in came:
                    if isinstance(error, BaseException):
                        raise error
            for kind, key, made in stages:
                if self._depot.lookup(kind, key) is None:
                    self._depot.record(kind, key, made)
            await self._depot.make_durable(came=bool(missing))
            self._depot.save(build)
        return build, there

    async def _bring(self, digest: str, directory: Path, fetch: Callable[[str, Path], None]) -> None:
        directory.mkdir(mode=0o700)
        await in_thread(lambda check: fetch(digest, directory))
        await self._depot.publish(directory, expected=digest)

    def facts_of(self, build: Build) -> dict[str, Any]:
        """What ``adopt`` needs on another node, besides the layers."""
        return travel.facts_of(build, self._depot.stages_of(build.layers))

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Those layers that are not on this node."""
        return [digest for digest in digests if not (self._depot.layers / digest).is_dir()]

    def load(self, build_id: str) -> Build:
        """A build by its id. Raises NotFound."""
        if build := self._depot.load(build_id):
            return build
        raise NotFound(f"no build {build_id[:64]!r} on this node", hint="`relume deploy` makes it")

    def builds(self) -> list[Build]:
        """All builds on this node, oldest first."""
        return self._depot.builds()

    def remove(self, build_id: str) -> None:
        """Forget a build and remove the layers that no other build needs. Raises NotFound.

        The caller sees to it that no instance runs on it. Made bases stay for the next build. Blocks while
        it deletes (seconds for large layers); may be called in a thread.
        """
        self._depot.forget(self.load(build_id))
        self._depot.sweep()

    async def clean(self) -> None:
        """Remove what builders that no longer live left: containers, control groups, mounts, scratch files."""
        for workspace in self._depot.abandoned():
            await end_all(workspace)
            await asyncio.to_thread(self._depot.drop, workspace)

    async def _plan(self, app_dir: Path, config: AppConfig, added: guest.Guest) -> Plan:
        deployment = config.deployment
        files = await in_thread(
            lambda check: app_files.scan(
                app_dir, deployment.include, deployment.exclude, config_name=config.file.name, check=check
            )
        )
        custom = config.runtime.custom
        uses_dockerfile = custom is not None and custom.dockerfile_path is not None
        base = None if uses_dockerfile else await bases.identify(deployment.docker_base_image_url, app_dir)
        plan = plans.plan(config, app_dir, files, base, added.digest)
        if added.argv is None:
            return plan
        if not any(entry.path == "main.py" for entry in files.entries):
            raise BuildError(
                "the app has no entrypoint and no main.py",
                hint="write main.py with functions, or [cerebrium.runtime.custom] entrypoint",
            )
        return plans.with_runner(plan, added.argv, added.requirements)

    def _refreshed(self, build: Build, config: AppConfig) -> Build:
        """The build with today's configuration: what is no input (memory, scaling) may have changed."""
        current = plans.with_config(build, config)
        if current != build:
            self._depot.save(current)
        return current

    def _assemble(self, plan: Plan, config: AppConfig, made: Result, taken: Collection[str] | None) -> Build:
        """``taken`` is None where the same layers are the same build."""
        digests = [layer.digest for layer in made.layers]
        generation = 0
        build_id = plans.build_id(plan.inputs_digest, digests, generation)
        while taken is not None and (build_id in taken or self._depot.load(build_id) is not None):
            generation += 1
            build_id = plans.build_id(plan.inputs_digest, digests, generation)
        return Build(
            build_id=build_id,
            app=plan.app,
            inputs_digest=plan.inputs_digest,
            layers=tuple(made.layers),
            argv=made.argv,
            env=made.env,
            cwd=made.cwd,
            user=made.user,
            port=plan.port,
            checkpointing=plan.checkpointing,
            config=plans.snapshot(config),
            base=str(made.facts.get("base", "")),
            resolved=made.facts,
            created_at=time.time(),
        )
