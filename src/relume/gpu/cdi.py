"""Containers with GPUs, by the Container Device Interface: what `nvidia-ctk` wrote down, as edits of an OCI config.

Reads /etc/cdi and /var/run/cdi like podman and containerd do (CDI specification 1.1; the later folder wins, and a
device that one folder names twice is nobody's). Gives back plain data in the words of the OCI runtime config, and
merges it into one. Nothing here needs a GPU or a privilege; whether the files it names exist is looked up only
when a device is asked for, as the specification says.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from relume.errors import GpuUnavailable
from relume.gpu.nvml import Gpu

FOLDERS: Final = (Path("/etc/cdi"), Path("/var/run/cdi"))
KIND: Final = "nvidia.com/gpu"
_LEFT_OUT: Final = "disable-device-node-modification"
"""A hook of nvidia-ctk that mounts one file of a tmpfs over /proc/driver/nvidia/params, which CRIU cannot save (criu
#2672). It keeps the libraries from making device nodes in a container; in a user namespace, and without CAP_MKNOD,
nobody can make any."""
_SONAMES: Final = ("0", "1", "2")
"""Versions in the SONAMEs of NVIDIA's libraries; ldconfig makes these links (``nvidia-cdi-hook update-ldcache``)."""
GENERATE: Final = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"

Edits = dict[str, Any]
"""A ``containerEdits`` object as the file has it."""


@dataclass(frozen=True, slots=True)
class Device:
    """One named device. ``shared`` are the edits that go with any device of its file, once."""

    name: str
    source: Path
    edits: Edits
    shared: Edits


@dataclass(frozen=True, slots=True)
class Registry:
    """All devices of one kind by name. ``problems`` are files that could not be read and names given twice."""

    devices: dict[str, Device] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OciEdits:
    """What to add to an OCI runtime config, in its own words; each list in the order of the files.

    ``made`` are paths in the root filesystem that the hooks make (links to libraries, the linker's cache). runc runs
    these hooks at a boot, not at a restore: the restored copy's layer needs the same files laid in.
    """

    env: tuple[str, ...] = ()
    devices: tuple[dict[str, Any], ...] = ()
    rules: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()
    hooks: tuple[tuple[str, dict[str, Any]], ...] = ()
    additional_gids: tuple[int, ...] = ()
    made: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """The device nodes inside, by path; a checkpoint remembers them for ``for_copy``."""
        return tuple(device["path"] for device in self.devices)


def load(folders: Sequence[Path] = FOLDERS, kind: str = KIND) -> Registry:
    """Read every .json and .yaml file. A bad file is a problem in the result, never an exception."""
    devices: dict[str, Device] = {}
    problems: list[str] = []
    for folder in folders:
        found: dict[str, Device] = {}
        twice: set[str] = set()
        for path in sorted(folder.glob("*")) if folder.is_dir() else ():
            if path.suffix not in (".json", ".yaml"):
                continue
            try:
                for device in _read(path, kind):
                    if device.name in found:
                        twice.add(device.name)
                        problems.append(
                            f"{kind}={device.name} is in {found[device.name].source} and in {path}"
                        )
                    found[device.name] = device
            except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
                problems.append(f"{path} is not a CDI specification: {type(error).__name__}: {error}")
        for name in twice:
            del found[name]
        devices |= found
    return Registry(devices, tuple(problems))


def edits_for(registry: Registry, gpus: Iterable[Gpu]) -> OciEdits:
    """The edits for these GPUs, found by UUID or index. Raises GpuUnavailable naming what is missing."""
    chosen: list[Device] = []
    for gpu in gpus:
        device = registry.devices.get(gpu.uuid) or registry.devices.get(str(gpu.index))
        if device is None:
            known = ", ".join(sorted(registry.devices)) or "none"
            raise GpuUnavailable(
                f"no CDI device {KIND}={gpu.index} or {KIND}={gpu.uuid}; there are: {known}",
                hint=GENERATE,
                problems=list(registry.problems),
            )
        chosen.append(device)
    shared = {str(device.source): device.shared for device in chosen}
    return _merge([device.edits for device in chosen] + list(shared.values()))


def for_copy(edits: OciEdits, saved: Sequence[str]) -> tuple[OciEdits, tuple[str, ...], tuple[str, ...]]:
    """The edits for a copy whose checkpoint had the nodes ``saved``; the nodes to add once it runs, and those to take
    away then (``nodes``).

    CRIU wants something at each saved name and makes nothing at others. A name that is not the copy's gets /dev/null
    (seen with runc 1.1.5 and CRIU 4.2.1 in a user namespace, where runc binds its devices).
    """
    stale = tuple(path for path in saved if path not in edits.nodes)
    fill = [
        {"destination": path, "type": "bind", "source": "/dev/null", "options": ["bind", "nosuid"]}
        for path in stale
    ]
    kept = tuple(device for device in edits.devices if device["path"] in saved)
    new = tuple(path for path in edits.nodes if path not in saved)
    return replace(edits, devices=kept, mounts=(*edits.mounts, *fill)), new, stale


def apply(config: dict[str, Any], edits: OciEdits) -> dict[str, Any]:
    """A copy of an OCI ``config`` with the edits added; what was there stays in front."""
    result: dict[str, Any] = json.loads(json.dumps(config))
    process = result.setdefault("process", {})
    process["env"] = [*process.get("env", ()), *edits.env]
    if edits.additional_gids:
        user = process.setdefault("user", {})
        user["additionalGids"] = [*user.get("additionalGids", ()), *edits.additional_gids]
    result["mounts"] = [*result.get("mounts", ()), *edits.mounts]
    linux = result.setdefault("linux", {})
    linux["devices"] = [*linux.get("devices", ()), *edits.devices]
    resources = linux.setdefault("resources", {})
    resources["devices"] = [*resources.get("devices", ()), *edits.rules]
    hooks = result.setdefault("hooks", {})
    for name, hook in edits.hooks:
        hooks.setdefault(name, []).append(hook)
    return result


def _read(path: Path, kind: str) -> list[Device]:
    text = path.read_text()
    spec = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    if spec["kind"] != kind:
        return []
    shared = spec.get("containerEdits") or {}
    return [
        Device(str(entry["name"]), path, entry.get("containerEdits") or {}, shared)
        for entry in spec["devices"]
    ]


def _merge(parts: Sequence[Edits]) -> OciEdits:
    env: list[str] = []
    nodes: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any] | None]] = {}
    mounts: dict[str, dict[str, Any]] = {}
    hooks: list[tuple[str, dict[str, Any]]] = []
    gids: list[int] = []
    made: list[str] = []
    for part in parts:
        env += part.get("env") or ()
        gids += [gid for gid in part.get("additionalGids") or () if gid]
        for node in part.get("deviceNodes") or ():
            nodes.setdefault(node["path"], _device(node))
        for mount in part.get("mounts") or ():
            mounts.setdefault(mount["containerPath"], _mount(mount))
        for hook in part.get("hooks") or ():
            if _LEFT_OUT in (hook.get("args") or ()):
                continue
            entry = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key)}
            if (hook["hookName"], entry) not in hooks:
                hooks.append((hook["hookName"], entry))
                made += _made_by(hook, mounts)
    return OciEdits(
        env=tuple(env),
        devices=tuple(device for device, _, _ in nodes.values() if device),
        rules=tuple(rule for _, rule, _ in nodes.values()),
        mounts=(*(bind for _, _, bind in nodes.values() if bind), *mounts.values()),
        hooks=tuple(hooks),
        additional_gids=tuple(dict.fromkeys(gids)),
        made=tuple(dict.fromkeys(made)),
    )


def _device(node: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any] | None]:
    """A device node as (linux.devices entry or None, cgroup rule, bind mount or None)."""
    inside, host = node["path"], node.get("hostPath") or node["path"]
    kind, major, minor = node.get("type"), node.get("major"), node.get("minor")
    if not kind or major is None:
        try:
            found = Path(host).stat()
        except OSError as error:
            raise GpuUnavailable(
                f"CDI names the device {host}, which is not there: {error.strerror}",
                hint=f"nvidia-modprobe -u -c=0 makes the devices; a stale file: {GENERATE}",
            ) from error
        kind = "b" if stat.S_ISBLK(found.st_mode) else "c"
        major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
    access = node.get("permissions") or "rwm"
    rule = {"allow": access != "none", "type": kind, "major": major, "minor": minor or 0}
    rule["access"] = "rwm" if access == "none" else access
    if host != inside:
        # In a user namespace runc binds the host's node of the same path; under another name it has to be a mount.
        return (
            None,
            rule,
            {"destination": inside, "type": "bind", "source": host, "options": ["bind", "nosuid"]},
        )
    entry = {"path": inside, "type": kind, "major": major, "minor": minor or 0}
    entry |= {key: node[key] for key in ("fileMode", "uid", "gid") if node.get(key) is not None}
    return entry, rule, None


def _mount(mount: dict[str, Any]) -> dict[str, Any]:
    source = mount["hostPath"]
    if not Path(source).exists():
        raise GpuUnavailable(
            f"CDI names {source}, which is not there: the driver was changed after the file was made",
            hint=GENERATE,
        )
    options = list(mount.get("options") or ("ro", "nosuid", "nodev", "rbind"))
    bind = "bind" in options or "rbind" in options
    kind = mount.get("type") or ("bind" if bind else "none")
    return {"destination": mount["containerPath"], "source": source, "type": kind, "options": options}


def _made_by(hook: dict[str, Any], mounted: Iterable[str]) -> list[str]:
    """Paths that NVIDIA's hooks may make: `create-symlinks --link TARGET::PATH ...`, and `update-ldcache --folder DIR`,
    by which ldconfig makes the cache and, beside each library of ``mounted``, the link that programs ask for."""
    args = [str(arg) for arg in hook.get("args") or ()]
    made = []
    if "create-symlinks" in args:
        made += [arg.removeprefix("--link=").split("::", 1)[1] for arg in args if "::" in arg]
    if "update-ldcache" in args:
        folders = {arg.removeprefix("--folder=").rstrip("/") for arg in args}
        made.append("/etc/ld.so.cache")
        for path in mounted:
            folder, _, name = path.rpartition("/")
            stem, so, _version = name.partition(".so.")
            if folder in folders and so:
                made += [f"{folder}/{stem}.so.{version}" for version in _SONAMES]
    # Where /lib is a link to /usr/lib, the layer has the file below /usr.
    return made + [f"/usr{path}" for path in made if path.startswith("/lib")]
