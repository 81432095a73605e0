"""Builds of the region: what another node made of the same inputs is adopted, what this node makes is published.

    does the region have a build of these inputs?
        yes -> adopt it: the layers that are missing here are fetched and compared with their digests
        no  -> take the lease on these inputs (while another node has it: wait, and look again),
               make the build, publish it

Guarantees: a store that does not answer, and a build that is damaged, forged or not complete, cost a deploy time
and never fail it: the build is made here, and the answer says why. It is published later if the store comes back;
never beside one that this node refuses, unless it was asked to make one anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from relume.build import Build, Builder, Planned
from relume.errors import Conflict, RelumeError, StoreError, Superseded, Untrusted
from relume.node.deployed import Deployed, How
from relume.node.region.threads import in_background
from relume.node.region.uploads import AGAIN_S, Spawn
from relume.node.region.view import View
from relume.store import BuildRecord, Lease, Progress, pack_tree, unpack_tree

log = logging.getLogger(__name__)

_POLL_S = 1.0
_SAY_S = 5.0

Say = Callable[[str], None]


class Builds:
    """The builds that this node takes from the region and gives to it."""

    def __init__(self, view: View, builder: Builder, spawn: Spawn, beside: Callable[[str], None]) -> None:
        """``beside`` begins to bring the checkpoint of a build, by its id, while the build's layers come."""
        self._view = view
        self._builder = builder
        self._spawn = spawn
        self._beside = beside
        self._pending: set[str] = set()
        self._sending = asyncio.Lock()  # two builds have layers in common: the second finds them there

    async def bring(self, planned: Planned, *, fresh: bool, say: Say) -> Deployed:
        """The region's build of these inputs, or one made here. Raises BuildError, HostError or EngineError."""
        waiting = False
        while True:
            record, reason = await self._look(planned)
            if record is not None and not fresh:
                try:
                    return await self._adopt(planned, record, say)
                except (RelumeError, OSError) as error:
                    reason = _why_not(error)
            if reason is not None and not fresh:
                return await self._alone(planned, reason, say)
            kept = contextlib.ExitStack()
            try:
                lease = await self._leased(planned.inputs, kept)
            except Conflict:
                if not waiting:
                    say("another node builds the same: waiting for it")
                waiting = True
                await self._wait(planned.inputs)
                continue
            except StoreError as error:
                return await self._alone(planned, reason or _why_not(error), say, fresh=fresh)
            try:
                if not fresh and (await self._look(planned))[0] is not None:
                    continue  # published between the look and the lease
                return await self._make(planned, lease, fresh=fresh, say=say)
            finally:
                await asyncio.to_thread(kept.close)

    async def _look(self, planned: Planned) -> tuple[BuildRecord | None, str | None]:
        """The region's build, and why there is none to be had where that is not known."""
        try:
            found = await asyncio.to_thread(self._view.starts.find_build, planned.app, planned.inputs)
        except StoreError as error:
            return None, _why_not(error)
        return found, None

    async def _leased(self, inputs: str, kept: contextlib.ExitStack) -> Lease:
        """The lease, renewed until ``kept`` is closed; a caller that goes away in the middle leaves none."""
        taking = asyncio.ensure_future(asyncio.to_thread(self._lease, inputs, kept))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            loop = asyncio.get_running_loop()
            taking.add_done_callback(lambda _: loop.run_in_executor(None, kept.close))
            raise

    def _lease(self, inputs: str, kept: contextlib.ExitStack) -> Lease:
        self._view.prove()
        return kept.enter_context(self._view.region.build_lease(inputs).kept())

    async def _wait(self, inputs: str) -> None:
        with contextlib.suppress(StoreError):  # the next look says it
            while await asyncio.to_thread(self._view.starts.is_building, inputs):  # noqa: ASYNC110  (another node ends it)
                await asyncio.sleep(_POLL_S)

    async def _adopt(self, planned: Planned, record: BuildRecord, say: Say) -> Deployed:
        digests = [ref.digest for ref in record.layers]
        missing = set(self._builder.missing(digests))
        if missing:
            size = sum(ref.size for ref in record.layers if ref.digest in missing)
            say(f"region: fetching {len(missing)} of {len(digests)} layers, {size / 1e6:.0f} MB unpacked")
            self._beside(str(record.facts.get("build_id")))
        build, there = await self._builder.adopt(planned, record.facts, digests, self._fetch)
        if there:
            say(f"build {build.build_id}: nothing changed, reused")
            return Deployed(build, "reused", in_region=True)
        say(f"build {build.build_id}: adopted from the region")
        log.info("build %s of %s is adopted from the region", build.build_id, build.app)
        return Deployed(build, "adopted", in_region=True)

    def _fetch(self, digest: str, directory: Path) -> None:
        file = directory.with_name(f"{digest}.tar")
        try:
            self._view.region.fetch_layer(digest, file)
            with file.open("rb") as tar:
                unpack_tree(tar, directory, f"layer {digest}", layer=True)
        finally:
            file.unlink(missing_ok=True)

    async def _alone(self, planned: Planned, reason: str, say: Say, *, fresh: bool = False) -> Deployed:
        """Without the region."""
        say(f"the region's build is not used: {reason}")
        build, there = await self._builder.make(planned, fresh=fresh, progress=say)
        self.publish_later(build)
        return Deployed(build, "reused" if there else "built", in_region=False, reason=reason)

    async def _make(self, planned: Planned, lease: Lease, *, fresh: bool, say: Say) -> Deployed:
        taken: set[str] = set()
        if fresh:
            with contextlib.suppress(StoreError):
                known = await asyncio.to_thread(self._view.region.builds, planned.app)
                taken = {str(record.facts.get("build_id")) for record in known}
        build, there = await self._builder.make(planned, fresh=fresh, taken=taken, progress=say)
        how: How = "reused" if there else "built"
        try:
            await self._publish(build, lease, say, mend=fresh)
        except (RelumeError, OSError) as error:
            say(f"build {build.build_id}: not published: {error}")
            self.publish_later(build)
            return Deployed(build, how, in_region=False, reason=f"it is not published: {error}")
        say(f"build {build.build_id}: published in the region")
        return Deployed(build, how, in_region=True)

    # --- publishing -------------------------------------------------------------------------------

    async def _publish(self, build: Build, lease: Lease, say: Say, *, mend: bool = False) -> None:
        async with self._sending:
            await self._send_and_say(build, lease, say, mend=mend)

    async def _send_and_say(self, build: Build, lease: Lease, say: Say, *, mend: bool) -> None:
        progress = Progress()
        work = asyncio.ensure_future(asyncio.to_thread(self._send, build, lease, progress, mend=mend))
        said = ""
        try:
            while not (await asyncio.wait([work], timeout=_SAY_S))[0]:
                text = f"region: sending layers, {progress if progress.total else 'packing'}"
                if text != said:
                    say(text)
                said = text
        finally:
            await asyncio.wait([work])
        work.result()
        log.info("build %s of %s is published: %s", build.build_id, build.app, progress)

    def _send(self, build: Build, lease: Lease, progress: Progress, *, mend: bool) -> None:
        layers = {layer.digest: layer.path for layer in build.layers}

        def pack(digest: str, file: Path) -> None:
            with file.open("wb") as out:
                file.chmod(0o600)
                pack_tree(layers[digest], out, layer=True)

        facts = self._builder.facts_of(build)
        self._view.region.publish_build(
            lease, build.app, build.inputs_digest, facts, list(layers), pack, progress, mend=mend
        )

    def take_up(self, builds: Iterable[Build]) -> None:
        """At the node's start: what an earlier run of it did not bring there."""
        for build in builds:
            self.publish_later(build)

    def publish_later(self, build: Build) -> None:
        """In the background, until the store answers; not beside another build of the same inputs."""
        if build.build_id not in self._pending:
            self._pending.add(build.build_id)
            self._spawn(self._until_published(build))

    async def _until_published(self, build: Build) -> None:
        tries = 0
        try:
            while not await self._published_now(build):
                await asyncio.sleep(AGAIN_S[min(tries, len(AGAIN_S) - 1)])
                tries += 1
        finally:
            self._pending.discard(build.build_id)

    async def _published_now(self, build: Build) -> bool:
        """Whether there is nothing left to do."""
        kept = contextlib.ExitStack()
        try:
            record = await in_background(self._view.region.find_build, build.app, build.inputs_digest)
            if record is not None:
                if record.facts.get("build_id") != build.build_id:
                    log.warning(
                        "the region has another build of %s of the same inputs; deploy it again to use that",
                        build.app,
                    )
                return True
            lease = await self._leased(build.inputs_digest, kept)
            await self._publish(build, lease, log.info)
        except Untrusted as error:
            log.warning("build %s is not published: %s", build.build_id, error.message)
        except (Conflict, Superseded):
            return False  # another node is at it, and this one will see its build
        except (RelumeError, OSError) as error:
            if not all(layer.path.is_dir() for layer in build.layers):
                return True  # removed meanwhile
            log.warning("build %s is not published yet: %s", build.build_id, error)
            return False
        finally:
            await in_background(kept.close)
        return True


def _why_not(error: Exception) -> str:
    if isinstance(error, Untrusted):
        return f"it is refused: {error.message}"
    return f"the region's store: {error}"
