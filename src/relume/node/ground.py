"""The ground an instance stands on: directories, id-mapped layers, overlay, bundle. Made and taken away here.

Everything lies below the instance's two directories, so that taking it away needs no memory of what was made:
a node that finds a stranger's leftovers under its own runtime directory removes them the same way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from relume.build import Build
from relume.engine import options
from relume.linux import cgroup, mounts, process
from relume.linux.files import remove_tree
from relume.node.places import InstancePlaces, Places
from relume.node.settings import Settings
from relume.runc import Mount, Runc, Spec
from relume.sidecar import ADDRESS

if TYPE_CHECKING:
    from relume.gpu.cdi import OciEdits

_HOSTS = "127.0.0.1\tlocalhost {name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_ORPHANS_S = 5.0
_RESOLVERS = (Path("/run/systemd/resolve/resolv.conf"), Path("/etc/resolv.conf"))


class Ground:
    """Makes the ground for instances of one node."""

    def __init__(self, places: Places, runc: Runc) -> None:
        self._places = places
        self._runc = runc
        self._namespaces: dict[tuple[int, int], int] = {}

    def prepare(self, places: InstancePlaces) -> None:
        """The empty directories of a spare instance."""
        for directory in (places.runtime, places.rootfs, places.images, places.runtime / "persistent"):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
            directory.chmod(0o711)
        places.bundle.mkdir(mode=0o700, exist_ok=True)
        for directory in (places.kept, places.criu_work):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (places.upper, places.work):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)

    def lay(
        self, places: InstancePlaces, build: Build, *, id_base: int, top: Path | None, copy: bool
    ) -> None:
        """Mount the build's layers (and ``top``, a saved writable layer) under a fresh writable one.

        ``copy``: held files are in the writable layer already. Then overlay must not ask for the marks it
        makes itself when copying up (index, nfs_export); without them an inotify watch cannot be dumped, but
        a copy never is.
        """
        namespace = self._namespace(id_base)
        lowers = []
        for number, path in enumerate([*(layer.path for layer in build.layers), *([top] if top else [])]):
            target = places.runtime / "layers" / str(number)
            target.mkdir(mode=0o711, parents=True)
            mounts.bind_idmapped(path, target, namespace, readonly=True)
            lowers.append(target)
        if not copy:
            os.chown(places.upper, id_base, id_base)
        handles = "index=off,nfs_export=off" if copy else "index=on,nfs_export=on"
        mounts.overlay(lowers, places.upper, places.work, places.rootfs, options=handles)

    def show_images(self, places: InstancePlaces, images: Path, *, id_base: int) -> None:
        """Make ``images`` readable for CRIU's processes, read-only, at the instance's ``images``.

        They read as the mapped root, whom the files then belong to; but the first of them opens
        timens-0.img when its user namespace exists and its maps are not written yet (CRIU writes them at the
        same time), so that it is the host's root without any capability. Hence the group: it stays the
        host's root, and the files are 0640.
        """
        mounts.bind_idmapped(images, places.images, self._namespace(id_base, groups=0), readonly=True)

    def bundle(
        self,
        places: InstancePlaces,
        build: Build,
        settings: Settings,
        *,
        id_base: int,
        environment: Mapping[str, str],
        edits: OciEdits | None = None,
    ) -> None:
        """Write ``config.json``, with the ``edits`` for its GPUs, and the files it mounts."""
        persistent = places.runtime / "persistent"
        kept = self._places.persistent(build.app)
        kept.mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.bind_idmapped(kept, persistent, self._namespace(id_base), readonly=False)
        uid, _, gid = build.user.partition(":")
        spec = Spec(
            rootfs=places.rootfs,
            argv=build.argv,
            env=environment,
            cwd=build.cwd,
            hostname=build.app,
            cgroup=places.cgroup,
            id_base=id_base,
            uid=int(uid or 0),
            gid=int(gid or 0),
            mounts=(
                Mount("/persistent-storage", str(persistent)),
                self._file(places, "/etc/hosts", _HOSTS.format(name=build.app)),
                self._file(places, "/etc/hostname", f"{build.app}\n"),
                self._file(places, "/etc/resolv.conf", _resolv_conf()),
            ),
            limits=settings.limits,
            create_runtime=(str(places.runtime / "hook"),),
            annotations={options.ANNOTATION: str(places.runtime / "criu.conf")},
        )
        config = places.bundle / "config.json"
        config.touch(mode=0o600)
        content = spec.as_dict()
        if edits is not None:
            from relume.gpu import cdi

            content = cdi.apply(content, edits)
        config.write_text(json.dumps(content))

    def _file(self, places: InstancePlaces, inside: str, content: str) -> Mount:
        path = places.runtime / Path(inside).name
        path.write_text(content)
        path.chmod(0o644)
        return Mount(inside, str(path), options=("bind", "ro", "nosuid", "nodev"))

    def end_orphans(self, places: InstancePlaces) -> None:
        """SIGKILL what a keeper that was killed has left of the engine's, in no group of the instance's: runc and CRIU
        in the middle of something, and the hook in which they would wait for that keeper for ever."""
        deadline = time.monotonic() + _ORPHANS_S
        while (pids := _of_the_engine(places)) and time.monotonic() < deadline:
            for pid in pids:
                process.send(pid, signal.SIGKILL)
            time.sleep(0.01)

    def clear(self, places: InstancePlaces, instance_id: str) -> None:
        """Take it all away: container, processes, cgroup, mounts, directories; the log stays."""
        subprocess.run(
            self._runc.argv("delete", "--force", instance_id),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        cgroup.kill(places.cgroup)
        cgroup.remove(places.cgroup)
        mounts.unmount_all(places.runtime)
        if left := mounts.under(places.runtime):
            # Never remove through a mount: behind one of them lies the app's /persistent-storage.
            raise OSError(errno.EBUSY, "still mounted", str(left[0]))
        shutil.rmtree(places.runtime, ignore_errors=True)
        remove_tree(places.kept / "layer")

    def close(self) -> None:
        for descriptor in self._namespaces.values():
            os.close(descriptor)

    def _namespace(self, id_base: int, *, groups: int | None = None) -> int:
        key = (id_base, id_base if groups is None else groups)
        if key not in self._namespaces:
            self._namespaces[key] = mounts.user_namespace(id_base, groups=groups)
        return self._namespaces[key]


def _of_the_engine(places: InstancePlaces) -> list[int]:
    """The processes that runc and CRIU are, or run: a folder of the instance is first on their PATH."""
    path = b"PATH=%s:" % os.fsencode(places.engine_bin)
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(entry.startswith(path) for entry in environment.read_bytes().split(b"\0")):
                found.append(int(environment.parent.name))
    return found


def _resolv_conf() -> str:
    """The host's, without resolvers that only the host can reach and without the sidecar's address."""
    for path in _RESOLVERS:
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        kept = [line for line in lines if not _useless(line)]
        if any(line.startswith("nameserver") for line in kept):
            return "".join(f"{line}\n" for line in kept)
    return ""


def _useless(line: str) -> bool:
    words = line.split()
    return words[:1] == ["nameserver"] and (
        len(words) < 2 or words[1].startswith("127.") or words[1] in ("::1", ADDRESS)
    )
