"""What runs inside a container: the SDK (``import relume`` there) and the server for apps of functions.

Two trees of plain files. The build room copies the *contents* of a tree into a directory on the container's
``sys.path``, after the app's own folder, so that nothing of ours hides a module of the app:

- ``sdk/``: the package ``relume``. Standard library only, Python >= 3.8. For every app.
- ``runner/``: the package ``relume_runner``. Needs ``runner_requirements()``, Python >= 3.10. For apps that
  have a ``main.py`` with functions and no entrypoint.

The SDK carries the name of this very package, and they never meet: here its modules are
``relume.guest.sdk.relume``, it imports only relatively, and nothing on the host imports it but its tests. The
folders ``sdk`` and ``runner`` are packages themselves for that one reason, so type checks and tests find each
file under one name.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["runner_argv", "runner_requirements", "runner_tree", "sdk_tree"]

_HERE = Path(__file__).resolve().parent


def sdk_tree() -> Path:
    """The folder whose contents make ``import relume`` work in a container."""
    return _HERE / "sdk"


def runner_tree() -> Path:
    """The folder whose contents make ``python3 -m relume_runner`` work in a container, beside the SDK's."""
    return _HERE / "runner"


def runner_requirements() -> list[str]:
    """What the runner needs from PyPI, as requirement lines; ``runner/requirements.txt`` is the one place."""
    lines = (runner_tree() / "requirements.txt").read_text().splitlines()
    return [line for line in (raw.split("#", 1)[0].strip() for raw in lines) if line]


def runner_argv(port: int, *, concurrency: int = 100) -> tuple[str, ...]:
    """The command that serves ``main.py`` of the working directory on ``port``, on all addresses.

    ``concurrency`` is ``[cerebrium.scaling] replica_concurrency``: how many calls run at once.
    """
    return ("python3", "-m", "relume_runner", "--port", str(port), "--concurrency", str(concurrency))
