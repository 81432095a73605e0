"""Makes a workload's build from what the machine has, where no registry and no package index answers.

    sudo PYTHON bench/offline.py WORKLOAD VENV [--without PACKAGE ...]

``PYTHON`` is relume's (.venv/bin/python), ``VENV`` a virtual environment of the system's Python that has what the
workload asks of pip. The stages base, system and python of the build become this machine's /usr and /etc, nothing,
and ``VENV``, by hard links and without hashing; guest and app are made as always. `relume bench --workload WORKLOAD`
finds them by the same inputs. ``--without`` leaves out packages of ``VENV`` that nobody asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relume.build.builder import Builder
from relume.build.depot import Depot, Made
from relume.build.image import DEFAULT_PATH, ImageConfig
from relume.build.model import Layer
from relume.build.plan import key_of
from relume.build.settings import gather
from relume.build.stages import Run
from relume.cli.benchmark.own_node import CACHE
from relume.cli.benchmark.workloads import WORKLOADS, Workload
from relume.config import load_app

_PLACES = ("bin", "sbin", "lib", "lib32", "lib64", "usr", "etc")
_LEFT_OUT = ("usr/local", "usr/share/doc", "usr/share/man", "usr/share/locale")
_EMPTY = ("dev", "opt", "proc", "root", "run", "sys", "tmp", "usr/local", "var/lib", "var/log", "var/tmp")


class Offline(Run):
    """A run through the stages whose lower ones are trees of this machine."""

    venv: Path
    without: tuple[str, ...]

    async def _base(self, name: Any) -> Made:
        async def make() -> Made:
            config = ImageConfig(env={"PATH": DEFAULT_PATH}).as_dict()
            return Made(self._place("base", self._root), {"config": config, "base": "this machine"})

        return await self._stage("base", name.identity, make)

    async def _layer(self, kind: str, inputs: object, work: Any, *, fresh: bool = False) -> None:
        trees: dict[str, Callable[[Path], None]] = {"system": lambda _: None, "python": self._environment}
        if kind not in trees:
            await super()._layer(kind, inputs, work, fresh=fresh)
            return

        async def make() -> Made:
            return Made(self._place(kind, trees[kind]), {})

        self._take(await self._stage(kind, inputs, make))

    def _place(self, kind: str, fill: Callable[[Path], None]) -> Layer:
        """A layer named by what it was made from, not by its bytes: it never leaves this machine."""
        digest = key_of(["from this machine", kind, os.uname().nodename, str(self.venv), self.without])
        layer = Layer(digest, self._depot.layers / digest)
        if not layer.path.is_dir():
            made = self._workspace / kind
            made.mkdir()
            fill(made)
            made.rename(layer.path)
        return layer

    def _root(self, target: Path) -> None:
        for name in _PLACES:
            source = Path("/", name)
            if source.is_symlink():
                (target / name).symlink_to(source.readlink())
            elif source.is_dir():
                _link(source, target / name, copy=name == "etc")
        for name in _LEFT_OUT:
            shutil.rmtree(target / name, ignore_errors=True)
        for name in _EMPTY:
            (target / name).mkdir(parents=True, exist_ok=True)

    def _environment(self, target: Path) -> None:
        place = target / "opt/venv"
        place.parent.mkdir()
        _link(self.venv, place)
        for package in self.without:
            for found in place.glob(f"lib/python3*/site-packages/{package}"):
                shutil.rmtree(found) if found.is_dir() else found.unlink()


def _link(source: Path, target: Path, *, copy: bool = False) -> None:
    how = "-ax" if copy else "-alx"
    subprocess.run(["cp", how, str(source), str(target)], check=True)


async def make(workload: Workload, venv: Path, without: tuple[str, ...]) -> None:
    builds = CACHE / "builds"
    builds.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = workload.directory
    planned = await Builder(builds).plan(directory, load_app(directory, name=f"bench-{workload.name}"))
    depot = Depot(builds)
    with depot.workspace() as workspace:
        settings = gather(os.environ, Path.home())
        run = Offline(depot, workspace, planned.plan, planned.added, settings, False, print)
        run.venv, run.without = venv, without
        made = await run.make()
    await depot.make_durable()
    print(f"{len(made.layers)} layers, to be found by `relume bench --workload {workload.name}`")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("venv", type=Path, metavar="VENV")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PACKAGE", help="names or patterns in site-packages"
    )
    options = parser.parse_args()
    asyncio.run(make(WORKLOADS[options.workload], options.venv.resolve(), tuple(options.without)))
