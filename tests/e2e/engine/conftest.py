"""A small laboratory: containers by runc in a user namespace, dumped and restored by CRIU, without a node.

Each container's root is an overlay over an id-mapped view of this machine's own root, so the programs of
this machine run inside. The network namespace has its loopback and 169.254.169.253, as an instance has.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from relume.engine import edit, held, tmpfs
from relume.linux import cgroup, mounts
from relume.runc import Runc, Spec, find_criu, find_runc

ID_BASE = 100_000
OTHER_BASE = 300_000
SIDECAR = "169.254.169.253"

HOOK = f"""
import json, os, sys
from relume.linux import netns
pid = json.load(sys.stdin)["pid"]
inside = netns.Inside(netns.open_of(pid))
inside.run(lambda: netns.loopback_up([{SIDECAR!r}]))
"""

CAPTURE = """
import dataclasses, json, os, sys
from pathlib import Path
from relume.engine import held
from relume.errors import Unsupported
from relume.linux import cgroup
if os.environ["CRTOOLS_SCRIPT_ACTION"] == "post-dump":
    job = json.load(open(sys.argv[1]))
    try:
        report = dataclasses.asdict(held.capture(
            cgroup.processes(job["cgroup"]), upper=Path(job["upper"]), rootfs=Path(job["rootfs"]),
            dest=Path(job["dest"]), id_base=job["id_base"], limit_bytes=job["limit"], everything=job["everything"],
        ))
    except Unsupported as error:
        report = error.as_dict()
    json.dump(report, open(sys.argv[1] + ".report", "w"))
    sys.exit("code" in report)
"""


def errors_in(log: str) -> list[str]:
    """The lines of a log of CRIU's that a person would look at first."""
    return [line for line in log.splitlines() if "Error" in line]


class Checkpoint:
    """The files of one checkpoint: ``images``, ``work`` (CRIU's log and stats), ``held``."""

    def __init__(self, directory: Path, *, everything: bool) -> None:
        self.directory = directory
        self.images, self.work, self.held = (directory / name for name in ("images", "work", "held"))
        for path in (directory, self.images, self.work, self.held):
            path.mkdir(mode=0o755)
        self.everything = everything
        self.report: dict[str, object] = {}
        self.edits: edit.EditReport | None = None
        self.empty_tmpfs = 0

    @property
    def log(self) -> str:
        log = self.work / "dump.log"
        return log.read_text(errors="replace") if log.exists() else ""


class Box:
    """One container. ``stdout`` is what it printed so far; ``init`` its first process, as the host sees it."""

    def __init__(self, lab: Lab, id_base: int) -> None:
        self.id = f"relume-lab-{uuid.uuid4().hex[:8]}"
        self.lab = lab
        self.id_base = id_base
        self.directory = lab.directory / self.id
        self.rootfs, self.upper, self.work = (self.directory / name for name in ("rootfs", "upper", "work"))
        for path in (self.directory, self.rootfs, self.upper, self.work):
            path.mkdir(mode=0o755)
        os.chown(self.upper, id_base, id_base)
        self.cgroup = f"/{lab.directory.name}/{self.id}"
        self.config = self.directory / "criu.conf"
        self.output = self.directory / "output"
        self._readers: list[subprocess.Popen[bytes]] = []

    def mount(self, options: str, *above: Path) -> None:
        """The overlay: this machine's root, what lies ``above`` it, and the writable layer."""
        layers = [self.lab.lower(path, self.id_base) for path in (Path("/"), *above)]
        mounts.overlay(layers, self.upper, self.work, self.rootfs, options=options)

    def prepare(self, argv: list[str]) -> None:
        spec = Spec(
            rootfs=self.rootfs,
            argv=argv,
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"},
            cwd="/",
            hostname="lab",
            cgroup=self.cgroup,
            id_base=self.id_base,
            create_runtime=[sys.executable, "-c", HOOK],
            annotations={"org.criu.config": str(self.config)},
        ).as_dict()
        # The runtime-spec starts hooks with an empty environment.
        spec["hooks"]["createRuntime"][0]["env"] = [f"PYTHONPATH={':'.join(sys.path)}"]
        (self.directory / "config.json").write_text(json.dumps(spec))

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        """A runc command that hands its stdio to the container: anonymous pipes, copied to a file by cat."""
        with self.output.open("ab") as output:
            cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
        assert cat.stdin is not None
        self._readers.append(cat)
        argv = self.lab.runc.argv(*arguments, self.id, log=self.directory / "runc.log")
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=cat.stdin,
            stderr=cat.stdin,
            env=self.lab.environment | (env or {}),
            timeout=50,
        )
        cat.stdin.close()
        if done.returncode != 0:
            errors = (
                errors_in(self.restore_log.read_text(errors="replace")) if self.restore_log.exists() else []
            )
            raise RuntimeError(f"{argv}: {(self.directory / 'runc.log').read_text()}\n" + "\n".join(errors))

    @property
    def restore_log(self) -> Path:
        return self.directory / "restore" / "restore.log"

    @property
    def init(self) -> int:
        state = subprocess.run(
            self.lab.runc.argv("state", self.id), capture_output=True, check=True, text=True
        ).stdout
        return int(json.loads(state)["pid"])

    @property
    def pids(self) -> list[int]:
        return cgroup.processes(self.cgroup)

    @property
    def stdout(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 20.0) -> str:
        """Wait until it printed ``text``; returns all it printed."""
        deadline = time.monotonic() + timeout
        while text not in self.stdout:
            if not self.pids:
                for reader in self._readers:
                    reader.wait(10)  # it may have said it with its last breath
                assert text in self.stdout, f"the container ended without {text!r}: {self.stdout}"
            assert time.monotonic() < deadline, f"no {text!r} from the container, only: {self.stdout}"
            time.sleep(0.02)
        return self.stdout

    def touch(self, path: str) -> None:
        """Make a file inside, which is how the tests tell a program to go on."""
        Path(f"/proc/{self.init}/root/{path}").touch()

    def dump(
        self,
        *,
        loopback: str = "keep",
        everything: bool = False,
        limit: int = 1 << 30,
        check: bool = True,
        own_tar: bool = True,
    ) -> Checkpoint:
        """Dump it and let it run on; edits the images as a checkpoint of relume would be.

        Without ``own_tar`` the contents of tmpfs mounts are as CRIU alone writes them.
        """
        made = Checkpoint(self.lab.stored / f"{uuid.uuid4().hex[:8]}", everything=everything)
        job = made.directory / "job.json"
        job.write_text(
            json.dumps(
                {
                    "cgroup": self.cgroup,
                    "upper": str(self.upper),
                    "rootfs": str(self.rootfs),
                    "dest": str(made.held),
                    "id_base": self.id_base,
                    "limit": limit,
                    "everything": everything,
                }
            )
        )
        script = made.directory / "action"
        script.write_text(
            f"#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = post-dump ] || exit 0\n"
            f"PYTHONPATH={':'.join(sys.path)} exec {sys.executable} -c {shlex.quote(CAPTURE)} {job}\n"
        )
        script.chmod(0o755)
        self.config.write_text(
            self.lab.options(
                loopback, f"action-script {script}", "ghost-limit 1073741824", "link-remap", "skip-in-flight"
            )
        )
        done = subprocess.run(
            self.lab.runc.argv(
                *("checkpoint", "--leave-running", "--image-path", str(made.images)),
                *("--work-path", str(made.work), "--empty-ns", "network", self.id),
                log=self.directory / "runc.log",
            ),
            env=(self.lab.environment if own_tar else self.lab.runc.environment()) | {"CRIU_FAULT": "137"},
            capture_output=True,
            text=True,
            timeout=50,
        )
        report = Path(f"{job}.report")
        made.report = json.loads(report.read_text()) if report.exists() else {}
        if done.returncode == 0:
            sockets = cast("dict[str, str]", made.report.get("sockets", {}))
            made.edits = edit.prepare_images(made.images, loopback=loopback, sockets=sockets)
            made.empty_tmpfs = tmpfs.lighten(made.images) if own_tar else 0
        elif check:
            raise AssertionError("\n".join([(self.directory / "runc.log").read_text(), *errors_in(made.log)]))
        return made

    def close(self) -> None:
        cgroup.kill(self.cgroup)
        subprocess.run(self.lab.runc.argv("delete", "--force", self.id), capture_output=True)
        for process in self._readers:
            process.kill()
            process.wait()
        cgroup.remove(self.cgroup)
        mounts.unmount_all(self.directory)
        shutil.rmtree(self.directory)


class Lab:
    """Everything of one test; :meth:`close` leaves nothing behind."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="relume-lab-", dir="/run"))
        self.directory.chmod(0o711)
        # A file system of its own: the lower layers of an overlay must not lie in one another.
        self.stored = self.directory / "stored"
        self.stored.mkdir()
        mounts.mount("tmpfs", self.stored, "tmpfs")
        self.runc = Runc(find_runc(), self.directory / "runc", find_criu())
        tmpfs.install(self.directory / "bin")
        self.environment = tmpfs.environment(self.runc.environment(), self.directory / "bin")
        self.boxes: list[Box] = []
        self._lowers: dict[tuple[Path, int], Path] = {}

    def lower(self, source: Path, id_base: int) -> Path:
        """An id-mapped view of ``source``, made once."""
        target = self._lowers.get((source, id_base))
        if target is None:
            target = self.directory / f"lower-{len(self._lowers)}"
            target.mkdir()
            userns = mounts.user_namespace(id_base)
            try:
                mounts.bind_idmapped(source, target, userns, readonly=True)
            finally:
                os.close(userns)
            self._lowers[source, id_base] = target
        return target

    @staticmethod
    def options(loopback: str, *lines: str) -> str:
        tcp = "tcp-established" if loopback == "keep" else "tcp-close"
        return "\n".join([*lines, "ext-unix-sk", "file-locks", "network-lock skip", tcp, "verbosity 4", ""])

    def boot(self, program: str, *, options: str = "index=on,nfs_export=on") -> Box:
        """Run a Python program in a fresh container."""
        box = Box(self, ID_BASE)
        self.boxes.append(box)
        box.mount(options)
        box.prepare(["/usr/bin/python3", "-c", program])
        box.run("run", "--detach", "--bundle", str(box.directory))
        return box

    def restore(
        self,
        checkpoint: Checkpoint,
        *,
        loopback: str = "keep",
        id_base: int = ID_BASE,
        options: str = "",
    ) -> Box:
        """A copy in a container of its own, beside whatever else runs."""
        box = Box(self, id_base)
        self.boxes.append(box)
        if checkpoint.everything:
            own = cast("list[str]", checkpoint.report["own_files"])
            held.lay(checkpoint.held, box.upper, id_base=id_base, only=own)
            box.mount(options, checkpoint.held)
        else:
            held.lay(checkpoint.held, box.upper, id_base=id_base)
            box.mount(options)
        box.prepare(["/bin/true"])
        edit.remap_ids(checkpoint.images, id_base=id_base)
        for image in checkpoint.images.iterdir():
            os.chown(image, id_base, id_base)
        os.chown(checkpoint.images, id_base, id_base)
        box.config.write_text(self.options(loopback, f"cgroup-root {box.cgroup}"))
        work = box.directory / "restore"
        work.mkdir()
        box.run(
            *("restore", "--detach", "--image-path", str(checkpoint.images), "--work-path", str(work)),
            *("--bundle", str(box.directory), "--empty-ns", "network"),
        )
        return box

    def close(self) -> None:
        for box in self.boxes:
            box.close()
        cgroup.remove(f"/{self.directory.name}")
        mounts.unmount_all(self.directory)
        shutil.rmtree(self.directory)


def let_go_on(*boxes: Box, until: str = "all well", timeout: float = 20.0) -> list[str]:
    """Tell the programs in all of them to go on; what each printed, once it printed ``until``."""
    for box in boxes:
        box.touch("go")
    return [box.wait_for(until, timeout) for box in boxes]


@pytest.fixture
def lab() -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.fail("these tests make containers: run them as root")
    made = Lab()
    try:
        yield made
    finally:
        made.close()
