"""Running the host's image tools (skopeo, umoci, buildah, mmdebstrap) as children that end when we do.

Guarantees: a command that fails raises BuildError with its argument list, exit status and last lines; one
whose waiter is cancelled is ended together with its process group before the cancellation goes on.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relume.build.interrupt import to_the_end
from relume.errors import BuildError, HostError
from relume.guest import runner_requirements

Progress = Callable[[str], None]

TAIL_LINES = 20
"""Lines of a failing command that a BuildError carries in ``details["output"]``."""

_MAX_LINE = 2000
_GRACE = 10.0
_WHEEL = "or a version of it that has a wheel"
_REMEDIES = {
    r"Cannot find command 'git'|Git executable not found": (
        'a git URL needs git: git = "latest" in [cerebrium.dependencies.apt]'
    ),
    r"command '\S*(gcc|g\+\+|cc|c\+\+)' failed: No such file|no acceptable C compiler": (
        f'it is compiled here: build-essential = "latest" in [cerebrium.dependencies.apt], {_WHEEL}'
    ),
    r"Python\.h: No such file": (
        f'it is compiled here: python3-dev = "latest" in [cerebrium.dependencies.apt], {_WHEEL}'
    ),
    # pip's, then uv's; only where one of the runner's own takes part.
    r"(?s)(?=.*(ResolutionImpossible|No solution found when resolving)).*\b(uvicorn|starlette)\b": (
        "relume serves an app that has no entrypoint by uvicorn and Starlette, whose ranges take part: "
        f"{' and '.join(runner_requirements())}; change the app's pins, or give it an entrypoint of its own"
    ),
    r"Unable to locate package": "the base's release has no package of that name",
}
"""What to do about what the last lines of a failing command say."""


async def run(
    argv: Sequence[str],
    *,
    what: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> str:
    """Run a command on the host to its end; returns its standard output. Both streams go to ``progress``.

    ``what`` says in the error what was being done; ``timeout`` is in seconds. Raises BuildError, and
    HostError where the program is not installed.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise HostError(
            f"{what}: {argv[0]} is not installed", hint=f"apt-get install {Path(argv[0]).name}"
        ) from error
    assert process.stdout and process.stderr
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    output: list[str] = []
    show = tee(tail, progress)

    def stdout(line: str) -> None:
        output.append(line)
        show(line)

    try:
        async with asyncio.timeout(timeout):
            await asyncio.gather(pump(process.stdout, stdout), pump(process.stderr, show))
            status = await process.wait()
    except TimeoutError:
        raise BuildError(
            f"{what}: no end after {timeout:g} s", command=shlex.join(argv), output=list(tail)
        ) from None
    finally:
        if process.returncode is None:
            await to_the_end(_end(process))
    if status:
        raise failure(what, argv, status, list(tail))
    return "".join(f"{line}\n" for line in output)


def failure(what: str, argv: Sequence[str], status: int, output: Sequence[str]) -> BuildError:
    """The BuildError of a failed command; its last lines are part of the message, as users need them."""
    command = shlex.join(argv)
    shown = "".join(f"\n  {line}" for line in output)
    remedies = (remedy for said, remedy in _REMEDIES.items() if re.search(said, shown))
    return BuildError(
        f"{what} failed with status {status}: {command[:400]}{shown}",
        hint=next(remedies, ""),
        command=command,
        status=status,
        output=list(output),
    )


async def pump(stream: asyncio.StreamReader, take: Callable[[str], None]) -> None:
    """Give each line to ``take``, without its end; a line longer than the buffer comes in pieces."""
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
        except asyncio.LimitOverrunError as error:
            line = await stream.readexactly(error.consumed)
        if not line:
            return
        take(line.decode("utf-8", "replace").rstrip("\r\n"))


def tee(tail: deque[str], progress: Progress | None) -> Callable[[str], None]:
    """Keep the last lines in ``tail`` and show every one, indented, to ``progress``."""

    def take(line: str) -> None:
        tail.append(line[:_MAX_LINE])
        if progress:
            progress(f"  {line}")

    return take


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the process group (mmdebstrap unmounts then), SIGKILL after a while."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            async with asyncio.timeout(_GRACE):
                await process.wait()
                break
        except TimeoutError:
            continue
    await process.wait()
