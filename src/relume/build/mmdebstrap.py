"""A Debian or Ubuntu base made from the host's own apt sources, for machines that no registry answers.

It is what the registry's slim image is, and Python with venv and the certificate authorities besides, which
nearly every app installs next. The host's mirrors, proxies and credentials are used and not left in it.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from relume.build import apt, command, settle, tree
from relume.build.command import Progress
from relume.build.interrupt import in_thread
from relume.build.settings import apt_options
from relume.errors import BuildError

PACKAGES = ("ca-certificates", "python3", "python3-venv")

_CREDENTIALS = ("/etc/apt/auth.conf", "/etc/apt/auth.conf.d")


async def make_base(release: apt.Release, rootfs: Path, progress: Progress) -> None:
    """Make the tree ``rootfs`` (must not exist). Raises BuildError."""
    sources = apt.sources_for(release)
    keyring = apt.keyring(release)
    if keyring is None:
        raise BuildError(
            f"this machine lacks the keys of {release.distribution}'s archive",
            hint=f"apt-get install {apt.KEYRING_PACKAGES[release.distribution]}",
        )
    started = time.time()
    options = [f"--aptopt={option}" for option in apt_options()]
    await command.run(
        [
            "mmdebstrap",
            "--mode=root",
            "--format=directory",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            *options,
            *_borrowed_credentials(),
            release.suite,
            str(rootfs),
            *apt.lines(sources, keyring),
        ],
        what=f"making a base of {release.distribution} {release.suite} by mmdebstrap",
        # The date goes into /etc/shadow; with a fixed one two nodes make the same base.
        env={**os.environ, "SOURCE_DATE_EPOCH": str(tree.EPOCH), "PYTHONHASHSEED": "0"},
        progress=progress,
    )
    await in_thread(lambda check: _neutral(rootfs, release, started))


def _borrowed_credentials() -> list[str]:
    present = [path for path in _CREDENTIALS if Path(path).exists()]
    return [f'--setup-hook=cp -a {" ".join(present)} "$1/etc/apt/"'] if present else []


def _neutral(rootfs: Path, release: apt.Release, started: float) -> None:
    """Take out what is the host's or the moment's."""
    etc = rootfs / "etc/apt"
    for name in ("auth.conf", "auth.conf.d", "apt.conf.d/99mmdebstrap"):
        path = etc / name
        if path.is_dir():
            shutil.rmtree(path)
            path.mkdir()
        else:
            path.unlink(missing_ok=True)
    public = apt.public_sources(release)
    keyring = apt.keyring(release)
    (etc / "sources.list").write_text("\n".join(apt.lines(public, keyring)) + "\n")
    for path in (rootfs / "dev").iterdir():  # every container gets its own
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    settle.settle(rootfs, (), since=started)
