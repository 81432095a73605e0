"""The base of a build: what ``docker_base_image_url`` or ``dockerfile_path`` names, as one layer.

``debian:bookworm-slim`` and other names come from a registry. Where none answers, the well-known Debian and
Ubuntu names are made here by mmdebstrap from the host's own apt sources; no other name can be. ``oci:PATH[:TAG]``
and ``docker-archive:PATH`` are files on this machine, relative to the app's directory.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from relume.build import apt, command, image, tree
from relume.build.command import Progress
from relume.build.depot import Depot, Made
from relume.build.image import ImageConfig
from relume.build.interrupt import in_thread
from relume.build.mmdebstrap import make_base
from relume.errors import BuildError

REGISTRY_PATIENCE = 60.0
"""Seconds that a registry has to answer with a manifest."""


@dataclasses.dataclass(frozen=True, slots=True)
class BaseName:
    """A base as written and where it is. ``identity`` enters ``build_id``: for files it is their content."""

    written: str
    transport: str
    """``registry``, ``oci`` or ``docker-archive``."""
    reference: str
    identity: str


async def identify(written: str, app_dir: Path) -> BaseName:
    """Read a ``docker_base_image_url``. Raises BuildError for files that are not there."""
    transport, colon, rest = written.partition(":")
    if transport == "oci" and colon:
        path, tag = _oci_path(app_dir, rest)
        digest = image.manifest_digest(path, tag)
        return BaseName(written, "oci", f"oci:{path}" + (f":{tag}" if tag else ""), f"oci {digest}")
    if transport == "docker-archive" and colon:
        path, tag = _archive_path(app_dir, rest)
        digest = (await in_thread(lambda check: tree.hash_file(path, check))).hex()
        reference = f"docker-archive:{path}" + (f":{tag}" if tag else "")
        return BaseName(written, "docker-archive", reference, f"archive {digest} {tag or ''}")
    name = written.removeprefix("docker://")
    return BaseName(written, "registry", name, f"registry {name}")


def _oci_path(app_dir: Path, rest: str) -> tuple[Path, str | None]:
    whole = (app_dir / rest).resolve()
    if whole.is_dir():
        return whole, None
    path, colon, tag = rest.rpartition(":")
    if colon and (found := (app_dir / path).resolve()).is_dir():
        return found, tag
    raise BuildError(
        f"oci:{rest}: no such directory", hint="oci: names an OCI image layout, as `skopeo copy` makes it"
    )


def _archive_path(app_dir: Path, rest: str) -> tuple[Path, str | None]:
    whole = (app_dir / rest).resolve()
    if whole.is_file():
        return whole, None
    path, colon, tag = rest.partition(":")
    if colon and (found := (app_dir / path).resolve()).is_file():
        return found, tag
    raise BuildError(
        f"docker-archive:{rest}: no such file", hint="docker-archive: names a file of `docker save`"
    )


async def make(base: BaseName, depot: Depot, workspace: Path, progress: Progress) -> Made:
    """Make the base's layer. Its facts: ``config`` (image config), ``base`` (what it is, in words)."""
    if base.transport != "registry":
        progress(f"base: {base.written}")
        return await from_image(base.reference, base.written, depot, workspace, progress)
    release = apt.known(base.reference)
    try:
        await _ask_registry(base.reference)
    except BuildError as error:
        if release is None:
            raise _unobtainable(base, error) from error
        progress(f"base: no registry answers for {base.written}; making it from this machine's apt sources")
        return await _bootstrap(release, depot, workspace, progress)
    progress(f"base: {base.written} from its registry")
    return await from_image(f"docker://{base.reference}", base.written, depot, workspace, progress)


async def from_image(source: str, what: str, depot: Depot, workspace: Path, progress: Progress) -> Made:
    """Fetch an image by skopeo and unpack it into a layer."""
    layout = workspace / "layout"
    await image.copy(source, layout, progress)
    rootfs, config, digest = await image.unpack(layout, workspace / "bundle", progress)
    layer = await depot.publish(rootfs)
    return Made(layer, {"config": config.as_dict(), "base": f"{what} ({digest})"})


async def _ask_registry(reference: str) -> None:
    await command.run(
        [
            "skopeo",
            "--command-timeout",
            f"{REGISTRY_PATIENCE:g}s",
            "inspect",
            "--raw",
            f"docker://{reference}",
        ],
        what=f"asking the registry for {reference}",
        timeout=REGISTRY_PATIENCE + 5,
    )


async def _bootstrap(release: apt.Release, depot: Depot, workspace: Path, progress: Progress) -> Made:
    started = time.time()
    rootfs = workspace / "rootfs"
    await make_base(release, rootfs, progress)
    layer = await depot.publish(rootfs)
    progress(f"base: {release.distribution} {release.suite} made in {time.time() - started:.0f} s")
    config = ImageConfig(env={"PATH": image.DEFAULT_PATH}, cmd=("bash",))
    return Made(
        layer, {"config": config.as_dict(), "base": f"{release.distribution} {release.suite} (mmdebstrap)"}
    )


def _unobtainable(base: BaseName, error: BuildError) -> BuildError:
    return BuildError(
        f"the base {base.written} cannot be had: {error.message}",
        hint="without a registry, use a Debian or Ubuntu name (debian:bookworm-slim, ubuntu:24.04), oci:PATH or "
        "docker-archive:PATH",
        **error.details,
    )
