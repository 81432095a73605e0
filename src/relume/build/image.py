"""OCI images: their config, and their layers as one tree.

Copying, checking digests and picking the platform are skopeo's; unpacking (whiteouts, hard links,
capabilities, path traversal) is umoci's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relume.build import command
from relume.build.command import Progress
from relume.errors import BuildError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclasses.dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says about running it (image-spec, config.md)."""

    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ImageConfig:
        """From the ``config`` object of an image's configuration; absent and null fields are empty."""
        env = dict(pair.partition("=")[::2] for pair in data.get("Env") or ())
        return cls(
            env=env,
            entrypoint=tuple(data.get("Entrypoint") or ()),
            cmd=tuple(data.get("Cmd") or ()),
            working_dir=data.get("WorkingDir") or "",
            user=data.get("User") or "",
        )

    def as_dict(self) -> dict[str, Any]:
        """The inverse of ``from_dict``."""
        return {
            "Env": [f"{name}={value}" for name, value in self.env.items()],
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "WorkingDir": self.working_dir,
            "User": self.user,
        }


async def copy(source: str, layout: Path, progress: Progress, *, timeout: float | None = None) -> None:
    """Copy one image (any of containers-transports(5)) to an OCI layout under the tag ``image``."""
    scratch = layout.parent / "skopeo-tmp"
    scratch.mkdir(exist_ok=True)
    await command.run(
        ["skopeo", "--tmpdir", str(scratch), "copy", "--quiet", source, f"oci:{layout}:image"],
        what=f"fetching the base {source}",
        progress=progress,
        timeout=timeout,
    )


async def unpack(layout: Path, bundle: Path, progress: Progress) -> tuple[Path, ImageConfig, str]:
    """Unpack the tag ``image`` of a layout: the tree, the config and the manifest's digest."""
    await command.run(
        ["umoci", "unpack", "--image", f"{layout}:image", str(bundle)],
        what="unpacking the base",
        progress=progress,
    )
    digest, config = read_config(layout, "image")
    return bundle / "rootfs", config, digest


def read_config(layout: Path, tag: str | None) -> tuple[str, ImageConfig]:
    """(manifest digest, config) of an image in a layout. Raises BuildError."""
    digest = manifest_digest(layout, tag)
    try:
        manifest = _blob(layout, digest)
        config = _blob(layout, manifest["config"]["digest"])
        return digest, ImageConfig.from_dict(config.get("config") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{layout}: not an OCI image layout that can be read: {error}") from error


def manifest_digest(layout: Path, tag: str | None) -> str:
    """The digest that a tag of a layout names; without a tag, of its only image. Raises BuildError."""
    try:
        manifests = json.loads((layout / "index.json").read_bytes())["manifests"]
        names = {
            entry.get("annotations", {}).get("org.opencontainers.image.ref.name", ""): str(entry["digest"])
            for entry in manifests
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"{layout}: no OCI image layout ({error})", hint="a layout is a directory with an index.json"
        ) from error
    if tag is None and len(names) == 1:
        return next(iter(names.values()))
    if tag not in names:
        known = ", ".join(sorted(name for name in names if name)) or "none"
        raise BuildError(
            f"{layout}: no tag {tag or '(none given)'}; it has: {known}", hint="write oci:PATH:TAG"
        )
    return names[tag]


def _blob(layout: Path, digest: str) -> dict[str, Any]:
    algorithm, _, value = digest.partition(":")
    if not (algorithm.isalnum() and value.isalnum()):
        raise ValueError(f"bad digest {digest}")
    data = json.loads((layout / "blobs" / algorithm / value).read_bytes())
    if not isinstance(data, dict):
        raise ValueError(f"blob {digest} is no object")
    return data


def find_user(root: Path, user: str) -> str:
    """An image's ``User`` (``name``, ``uid``, ``name:group``, ``uid:gid`` or empty) as ``UID:GID``.

    Raises BuildError where a name is not in the tree's passwd or group file.
    """
    if not user:
        return "0:0"
    who, _, group = user.partition(":")
    accounts = [line.split(":") for line in _lines(root / "etc/passwd")]
    account = next((fields for fields in accounts if len(fields) > 3 and who in (fields[0], fields[2])), None)
    if account is None and not who.isdigit():
        raise BuildError(f"the base runs as the user {who}, which its /etc/passwd does not have")
    uid = account[2] if account else who
    gid = account[3] if account else "0"
    if group:
        groups = [line.split(":") for line in _lines(root / "etc/group")]
        found = next(
            (fields[2] for fields in groups if len(fields) > 2 and group in (fields[0], fields[2])), None
        )
        if found is None and not group.isdigit():
            raise BuildError(f"the base runs in the group {group}, which its /etc/group does not have")
        gid = found or group
    return f"{uid}:{gid}"


def find_home(root: Path, user: str) -> str:
    """The home directory of ``UID:GID``; ``/`` where the tree does not say."""
    uid = user.partition(":")[0]
    for line in _lines(root / "etc/passwd"):
        fields = line.split(":")
        if len(fields) > 5 and fields[2] == uid:
            return fields[5] or "/"
    return "/"


def _lines(path: Path) -> list[str]:
    if path.is_symlink() or not path.is_file():  # a link could lead out of the tree
        return []
    return path.read_text(errors="replace").splitlines()
