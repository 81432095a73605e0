"""The node: puts the rooms together, takes over what an earlier run left, and offers the verbs of the API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relume.build import Build, Builder
from relume.checkpoint import platform
from relume.checkpoint.capture import Capturer
from relume.checkpoint.restore import Restoration
from relume.checkpoint.shelf import Checkpoint, Shelf
from relume.config import NodeConfig, load_app
from relume.engine.network import pasta
from relume.errors import BadRequest, NotFound, RelumeError, StoreError
from relume.images import integrity
from relume.keeper.zygote import Zygote
from relume.node import machine
from relume.node.background import Background
from relume.node.bringup import BringUp
from relume.node.deployed import Deployed
from relume.node.gpus import Gpus
from relume.node.ground import Ground
from relume.node.inspection import described, learned_bytes, why_not_on
from relume.node.lifecycle import Lifecycle
from relume.node.places import Places
from relume.node.requests import subject
from relume.node.retention import outlived
from relume.node.secrets import Secrets
from relume.node.settings import Settings
from relume.node.spares import Spares
from relume.node.start import Started
from relume.node.state import State
from relume.runc import Runc, find_criu, find_runc

if TYPE_CHECKING:
    from relume.node.region import NodeRegion

log = logging.getLogger(__name__)

MEMORIES = ("paged", "unlearned", "eager", "criu")
"""How a copy's memory may come (Lifecycle.start); all but the first are for comparison."""

_RETAIN_S = 600.0
"""Seconds between looks for checkpoints that have had their time."""

_APP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Node:
    """One running node. ``open`` before anything else, ``close`` at the end; instances outlive both."""

    def __init__(self, config: NodeConfig, state: Path) -> None:
        self._config = config
        self._state = State(state)
        self.places = Places(state, self._state.node_id())
        self._runc = Runc(find_runc(), self.places.runc_root, find_criu())
        self.pages_lazily = machine.prepare(self.places, allow_userfaultfd=config.node.allow_userfaultfd)
        self._claim = machine.claim(self.places)
        self.platform = platform.here(
            criu=machine.program_version(find_criu(), "--version"),
            runc=machine.program_version(find_runc(), "--version"),
        )
        self._shelf = Shelf(state / "checkpoints")
        self._builder = Builder(state / "builds")
        self._ground = Ground(self.places, self._runc)
        self._spares = Spares(
            self.places,
            self._ground,
            self._runc,
            Zygote(store=config.store.url is not None),
            outgoing=pasta() is not None,
        )
        self.background = Background()
        self._region = self._region_of(config)
        self._gpus = Gpus([Path(folder) for folder in config.node.cdi_spec_dirs])
        uploads = self._region.uploads if self._region is not None else None
        self._capturer = Capturer(
            self._shelf, self.platform, self._gpus.memory, uploads, config.node.dumps_in_memory
        )
        self._bringup = BringUp(
            self.places,
            self._shelf,
            self._ground,
            self._gpus,
            self._region,
            log_limit=config.node.max_log_bytes,
            pages_lazily=self.pages_lazily,
        )
        self.lifecycle = Lifecycle(
            self.places,
            self._state,
            self._shelf,
            self._capturer,
            self._ground,
            self._spares,
            self.background,
            self._region,
            gpus=self._gpus,
            build_of=self._build_of,
            bringup=self._bringup,
        )

    def _region_of(self, config: NodeConfig) -> NodeRegion | None:
        """None without ``[store] url``; then nothing of the store room is even imported."""
        if config.store.url is None:
            return None
        from relume.node.region import NodeRegion

        return NodeRegion(
            config,
            self.places.region,
            self.places.node_id,
            shelf=self._shelf,
            platform=self.platform,
            builder=self._builder,
            spawn=self.background.spawn,
        )

    async def open(self) -> None:
        """Take over running instances, take away what a crash left, get ready."""
        self._shelf.sweep()
        await self._builder.clean()
        if self._region is not None:
            await self._region.open(self._deployed())
        over = await self._adopt()
        self._sweep()  # before anything is written: on a full disk it makes room
        for row in over:
            instance_id = row["instance_id"]
            self.lifecycle.roster.ended_before(row, self.lifecycle.adoption.exit_code(instance_id))
        self.background.spawn(self.lifecycle.roster.write_later())
        self._spares.refill()
        self.lifecycle.adoption.replace_failed()
        self.background.spawn(asyncio.to_thread(machine.keep_in_memory, self._runc.binary, find_criu()))
        for app in {instance.build.app for instance in self.lifecycle.instances.values()}:
            self.lifecycle.prepared.want(app)
        self.background.spawn(self.lifecycle.prepared.run())
        if self._config.store.keep_checkpoints is not None or self._config.store.keep_days is not None:
            self.background.spawn(self._retain())

    def _deployed(self) -> list[Build]:
        """The builds that a start would use."""
        found = []
        for app in self._state.apps():
            with contextlib.suppress(NotFound):
                found.append(self._build_of(app.name))
        return found

    async def _adopt(self) -> list[dict[str, Any]]:
        """Take over what runs; the rows of those that are over."""
        over = []
        for row in self._state.instances():
            if row["ended_at"] is not None:
                continue
            try:
                adopted = await self.lifecycle.adoption.adopt(row, self._builder.load(row["build_id"]))
            except NotFound:
                adopted = False
            if adopted:
                log.info("adopted %s of %s", row["instance_id"], row["app"])
            else:
                over.append(row)
        return over

    def _sweep(self) -> None:
        """Remove what belongs to no living instance, below this node's own directories only."""
        living = self.lifecycle.instances
        for root in (self.places.runtime, self.places.state / "instances"):
            for directory in root.glob("i-*"):
                if directory.name not in living:
                    self._clear(directory.name)
        self._shelf.clear_half_made()
        for name in self._shelf.unreadable():
            log.warning("%s cannot be read; `relume checkpoints rm %s` frees its disk space", name, name)
        for intent in self._shelf.unfinished():
            if intent.instance_id not in living:
                self._shelf.abandon(intent.dump_id)

    def _clear(self, instance_id: str) -> None:
        try:
            self._ground.end_orphans(self.places.instance(instance_id))
            self._ground.clear(self.places.instance(instance_id), instance_id)
        except OSError as error:
            log.error("clearing up after %s: %s", instance_id, error)

    async def _retain(self) -> None:
        """Remove checkpoints that have had their time, for as long as the node runs."""
        store = self._config.store
        while True:
            try:
                rows = await asyncio.to_thread(self.checkpoints)
                doomed = outlived(
                    rows, keep=store.keep_checkpoints, keep_days=store.keep_days, now=time.time()
                )
                for checkpoint_id, why in doomed.items():
                    log.info("%s is removed: %s", checkpoint_id, why)
                    with contextlib.suppress(NotFound):  # another node was faster
                        await asyncio.to_thread(self.remove_checkpoint, checkpoint_id)
            except (RelumeError, OSError) as error:
                log.warning("old checkpoints are not removed: %s", error)
            await asyncio.sleep(_RETAIN_S)

    async def close(self) -> None:
        """Let go; what runs, runs on."""
        await self.lifecycle.close()
        await self._gpus.close()
        await self._spares.close()
        self._ground.close()
        if not self.lifecycle.instances:
            machine.tidy(self.places)
        os.close(self._claim)
        self._state.close()

    # --- verbs ------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return {
            "node_id": self.places.node_id,
            "state": str(self.places.state),
            "instances": len(self.lifecycle.instances),
            "apps": len(self._state.apps()),
            "checkpoints": len(self._shelf.all()),
            "platform": self.platform.key,
            "kernel": self.platform.kernel,
            "criu": self.platform.criu,
            "runc": self.platform.runc,
            "paging": self.pages_lazily,
            "region": self._region.name if self._region is not None else None,
        }

    async def deploy(
        self,
        directory: Path,
        *,
        config_file: Path | None,
        name: str | None,
        fresh: bool,
        progress: Callable[[str], None],
    ) -> Deployed:
        """The build of the app in ``directory``, made or found; it is what ``start`` starts from now on."""
        config = load_app(directory, config_file=config_file, name=name)
        gpus = await self._gpus.most(config.hardware.compute) if config.hardware.family == "gpu" else 0
        config.require_deployable(gpus=gpus)
        _check_name(config.name)
        planned = await self._builder.plan(directory, config)
        if self._region is not None:
            deployed = await self._region.builds.bring(planned, fresh=fresh, say=progress)
        else:
            build, there = await self._builder.make(planned, fresh=fresh, progress=progress)
            deployed = Deployed(build, "reused" if there else "built")
        build = deployed.build
        self._state.ensure_app(build.app)
        self._state.set_build(build.app, build.build_id, str(directory))
        return deployed

    async def start(
        self, app: str, *, restore: bool, environment: Mapping[str, str], memory: str = "paged"
    ) -> Started:
        if memory not in MEMORIES:
            raise BadRequest(f"memory is one of {', '.join(MEMORIES)}, not {memory!r}")
        return await self.lifecycle.start(
            self._build_of(app), restore_wanted=restore, environment=environment, memory=memory
        )

    async def explain_start(self, app: str) -> dict[str, Any]:
        """What a start would do, and why."""
        build = self._build_of(app)
        offers = await self.lifecycle.offers(build)
        reason, checkpoint = self.lifecycle.choose(build, restore_wanted=True, offers=offers)
        checkpoint_id = checkpoint.checkpoint_id if checkpoint else None
        if checkpoint_id is not None and self._region is not None:
            gone = await self._region.copies.gone(checkpoint_id)
            reason, checkpoint_id = gone, None if gone else checkpoint_id
        if checkpoint_id is None and build.checkpointing and self._region is not None:
            why_not, checkpoint_id = await asyncio.to_thread(self._region.copies.look, build)
            reason = None if checkpoint_id else why_not or reason
        return {
            "app": app,
            "build_id": build.build_id,
            "would_restore": checkpoint_id is not None,
            "checkpoint_id": checkpoint_id,
            "reason": reason,
        }

    def _build_of(self, app: str) -> Build:
        _check_name(app)
        build_id = self._state.app(app).build_id
        if build_id is None:
            raise NotFound(f"app {app!r} has no finished build", hint="relume deploy")
        return self._builder.load(build_id)

    async def stop(self, target: str) -> list[str]:
        """Stop an instance, or every instance of an app; returns their ids."""
        if target not in self.lifecycle.instances:
            self._known(target)
            await self.lifecycle.prepared.forget(target)
        try:
            instances = self.lifecycle.roster.find(target)
        except NotFound:
            instances = []  # known, and not running: what was asked for is so, but for a start in between
        stops = [self.lifecycle.ending.stop(instance) for instance in instances]
        await asyncio.gather(self.lifecycle.starts.call_off(target), *stops)
        return [instance.instance_id for instance in instances]

    def _known(self, target: str) -> None:
        if not any(target in (row["instance_id"], row["app"]) for row in self._state.instances()):
            self._state.app(target)

    def instances(self) -> list[dict[str, Any]]:
        """``ps``: what lives, and what ended lately."""
        living = self.lifecycle.instances
        rows = []
        for row in self._state.instances():
            if row["instance_id"] in living:
                rows.append(living[row["instance_id"]].listing())
            else:
                rows.append(
                    {
                        "instance_id": row["instance_id"],
                        "app": row["app"],
                        "build_id": row["build_id"],
                        # Without an end it could not be written that it ended: the disk was full.
                        "state": row["state"] if row["ended_at"] is not None else "exited",
                        "restored": row["facts"]["restored"],
                        "checkpoint_id": row["facts"]["checkpoint_id"],
                        "url": None,
                        "memory_bytes": 0,
                        "started_at": row["started_at"],
                        "exit_code": row["facts"].get("exit_code"),
                    }
                )
        return rows

    def apps(self) -> list[dict[str, Any]]:
        living = self.lifecycle.instances.values()
        return [
            {
                "app": app.name,
                "build_id": app.build_id,
                "directory": app.directory,
                "instances": sum(instance.build.app == app.name for instance in living),
                "created_at": app.created_at,
            }
            for app in self._state.apps()
        ]

    async def remove_app(self, name: str) -> str | None:
        """Stop and remove everything of an app: instances, checkpoints, builds, secrets, its kept folder stays.

        In a region its checkpoints and builds are removed there too, also those of an app that this node never
        had; returns why they were not, if the store could not be told. Raises NotFound.
        """
        known = any(app.name == name for app in self._state.apps())
        if known or self._region is None:
            await self.stop(name)
        left = None
        if self._region is not None:
            left = await self._remove_from_region(self._region, name, known)
        for checkpoint in self._shelf.all():
            if checkpoint.app == name:
                await asyncio.to_thread(self._remove_here, checkpoint.checkpoint_id)
        for build in self._builder.builds():
            if build.app == name:
                self._builder.remove(build.build_id)
        Secrets(self.places.secrets(name)).clear()
        self.lifecycle.roster.prune(name, 0)
        self._state.remove_app(name)
        return left

    async def _remove_from_region(self, region: NodeRegion, name: str, known: bool) -> str | None:
        try:
            removed = await asyncio.to_thread(region.catalogue.remove_app, name)
        except StoreError as error:
            if not known:
                raise
            log.warning("the region still has checkpoints and builds of %s: %s", name, error.message)
            return f"what the region has of it stays: {error.message}"
        if not known and not removed:
            self._state.app(name)
        return None

    async def explain_checkpoint(self, instance_id: str) -> dict[str, Any]:
        """Would a checkpoint of the instance work, how large would it be, how long would it take; stops nothing."""
        (instance,) = self.lifecycle.roster.find(instance_id)[-1:]
        return await self._capturer.explain(subject(instance))

    # --- checkpoints ------------------------------------------------------------------------------

    def checkpoints(self) -> list[dict[str, Any]]:
        """``checkpoints ls``: finished ones and those in the making."""
        rows = [self._checkpoint_row(checkpoint) for checkpoint in self._shelf.all()]
        rows += [
            {
                "checkpoint_id": f"cp-{intent.dump_id}",
                "app": intent.app,
                "build_id": intent.build_id,
                "platform": self.platform.key,
                "state": "creating",
                "where": [],
                "upload": None,
                "size_bytes": 0,
                "created_at": intent.started_at,
            }
            for intent in self._shelf.unfinished()
        ]
        if self._region is not None:
            rows += self._region.catalogue.rows(row["checkpoint_id"] for row in rows)
        return rows

    def _checkpoint_row(self, checkpoint: Checkpoint) -> dict[str, Any]:
        health = self._shelf.health(checkpoint.checkpoint_id)
        aside = self._shelf.why_aside(checkpoint.checkpoint_id)
        return {
            "checkpoint_id": checkpoint.checkpoint_id,
            "app": checkpoint.app,
            "build_id": checkpoint.build_id,
            "platform": checkpoint.platform.key,
            "state": "quarantined" if health.quarantined or aside else "ready",
            "where": ["local", "remote"]
            if self._is_published(checkpoint.checkpoint_id) and not aside
            else ["local"],
            "upload": self._region.uploads.progress(checkpoint.checkpoint_id)
            if self._region is not None
            else None,
            "size_bytes": checkpoint.size_bytes,
            "created_at": checkpoint.created_at,
        }

    def _is_published(self, checkpoint_id: str) -> bool:
        return self._region is not None and self._region.catalogue.published(checkpoint_id) is not None

    async def checkpoint(self, checkpoint_id: str) -> dict[str, Any]:
        """``checkpoints inspect``."""
        try:
            checkpoint = self._shelf.load(checkpoint_id)
        except NotFound:
            if self._region is None:
                raise
            return await asyncio.to_thread(self._region.catalogue.inspect, checkpoint_id)
        health = self._shelf.health(checkpoint_id)
        offers = await self._offers_like(checkpoint)
        reasons = platform.differences(checkpoint.platform, self.platform, offers)
        reasons += why_not_on(self._build(checkpoint.build_id), checkpoint)
        if health.quarantined:
            reasons.append(f"quarantined: {health.reason}")
        if aside := self._shelf.why_aside(checkpoint_id):
            reasons.append(aside)
        directory = self._shelf.directory(checkpoint_id)
        found = self._checkpoint_row(checkpoint) | described(checkpoint)
        found |= {
            "memory": self._how_memory_comes(checkpoint),
            "working_set_bytes": await asyncio.to_thread(learned_bytes, directory),
            "failures": health.failures,
        }
        if self._region is not None:
            found["region"] = await asyncio.to_thread(self._region.catalogue.about, checkpoint_id)
        return found | {"would_be_used": not reasons, "why_not": reasons}

    def _build(self, build_id: str) -> Build | None:
        try:
            return self._builder.load(build_id)
        except NotFound:
            return None

    def _how_memory_comes(self, checkpoint: Checkpoint) -> str:
        try:
            settings = Settings.of(self._builder.load(checkpoint.build_id))
        except NotFound:
            return "unknown: its build is gone"
        return self._bringup.how_memory_comes(checkpoint, settings)

    async def _offers_like(self, checkpoint: Checkpoint) -> platform.Offers:
        """The GPUs that a copy could get now."""
        if not checkpoint.gpu:
            return platform.NO_GPU
        try:
            settings = Settings.of(self._builder.load(checkpoint.build_id))
        except NotFound:
            return platform.NO_GPU
        return await self._gpus.offers(settings.compute, settings.gpus)

    def verify_checkpoint(self, checkpoint_id: str) -> dict[str, Any]:
        """Read every byte and compare it with what was written. Raises Untrusted or ImageError.

        Here where it lies here, in the store where it does not.
        """
        try:
            checkpoint = self._shelf.load(checkpoint_id)
        except NotFound:
            if self._region is None:
                raise
            return self._region.catalogue.verify(checkpoint_id)
        Restoration(self._shelf, checkpoint, checkpoint.id_base, verified=None).verify(pages=True)
        return {"checkpoint_id": checkpoint_id, "ok": True}

    def remove_checkpoint(self, checkpoint_id: str) -> None:
        """Here and in the whole region. Blocking with a region. Raises NotFound, StoreError."""
        if self._region is None:
            self._remove_here(checkpoint_id)
            return
        removed = self._region.catalogue.remove(checkpoint_id)
        try:
            self._remove_here(checkpoint_id)
        except NotFound:
            if not removed:
                raise

    def _remove_here(self, checkpoint_id: str) -> None:
        """What the region's cache holds goes by the cache's own rules."""
        directory = self._shelf.directory(checkpoint_id)
        if directory.parent == self._shelf.root:
            integrity.forget(directory / "images", self.places.verified)
            self._shelf.remove(checkpoint_id)
        self._shelf.unlink(checkpoint_id)

    @property
    def region(self) -> NodeRegion:
        """For the verbs that need one. Raises BadRequest on a node without."""
        if self._region is None:
            raise BadRequest(
                "this node has no region",
                hint="[store] url in node.toml; docs/region.md says how to set one up",
            )
        return self._region

    # --- secrets ----------------------------------------------------------------------------------

    def secrets(self, app: str) -> Secrets:
        """The secrets of an app; it need not be deployed yet."""
        _check_name(app)
        return Secrets(self.places.secrets(app))


def _check_name(name: str) -> None:
    if not _APP_NAME.fullmatch(name):
        raise BadRequest(
            f"{name!r} is not a name for an app",
            hint="letters, digits, dots, dashes and underscores, 63 at most, a letter or digit first",
        )
