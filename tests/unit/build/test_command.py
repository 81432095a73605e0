"""Running host commands, and ending them early."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relume.build import command
from relume.build.interrupt import Interrupted, in_thread, to_the_end
from relume.errors import BuildError, HostError


async def test_output_goes_back_and_to_progress() -> None:
    lines: list[str] = []
    output = await command.run(["sh", "-c", "echo out; echo err >&2"], what="it", progress=lines.append)
    assert output == "out\n"
    assert sorted(lines) == ["  err", "  out"]


async def test_a_failure_says_command_status_and_last_lines() -> None:
    with pytest.raises(BuildError) as caught:
        await command.run(["sh", "-c", "seq 100; echo last >&2; exit 3"], what="counting")
    error = caught.value
    assert error.message.startswith("counting failed with status 3: sh -c")
    assert error.details["status"] == 3
    assert len(error.details["output"]) == command.TAIL_LINES
    assert {"100", "last"} <= set(error.details["output"])


# An app that pins fastapi==0.110.0, and a runner that needs starlette>=0.40.
PIP_CONFLICT = """\
The conflict is caused by:
    The user requested starlette<2 and >=0.40
    fastapi 0.110.0 depends on starlette<0.37.0 and >=0.36.3

To fix this you could try to:
1. loosen the range of package versions you've specified
2. remove package versions to allow pip attempt to solve the dependency conflict

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/"""
UV_CONFLICT = """\
error: No solution found when resolving dependencies
  cause: Because fastapi==0.110.0 depends on starlette>=0.36.3,<0.37.0 and you require fastapi==0.110.0, we can
  conclude that you require starlette>=0.36.3,<0.37.0.
         And because you require starlette>=0.40,<2, we can conclude that your requirements are unsatisfiable."""


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ERROR: Cannot find command 'git' - do you have 'git' installed and in your PATH?", "git ="),
        ("error: command 'x86_64-linux-gnu-gcc' failed: No such file or directory", "build-essential"),
        (PIP_CONFLICT, "uvicorn>="),
        (UV_CONFLICT, "starlette>="),
        (PIP_CONFLICT.replace("starlette", "numpy"), ""),
        ("ERROR: No matching distribution found for uvicorn==9", ""),
        ("E: Unable to locate package nonsense", "base's release"),
        ("ERROR: No matching distribution found for nonsense", ""),
    ],
)
def test_a_failure_that_is_known_has_a_remedy(said: str, remedy: str) -> None:
    hint = command.failure("pip", ["pip"], 1, ["before", said]).hint
    assert (remedy in hint) if remedy else not hint


async def test_lines_without_an_end_and_of_any_length() -> None:
    output = await command.run(
        ["sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x; printf '\\nend'"], what="it"
    )
    assert output.replace("\n", "") == "x" * 300_000 + "end"


async def test_a_program_that_is_not_there() -> None:
    with pytest.raises(HostError, match="not installed"):
        await command.run(["relume-no-such-program"], what="it")


async def test_a_command_that_takes_too_long() -> None:
    with pytest.raises(BuildError, match=r"no end after 0\.2 s"):
        await command.run(["sleep", "60"], what="it", timeout=0.2)


async def test_cancelling_ends_the_whole_process_group(tmp_path: Path) -> None:
    ready = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {ready}.new; mv {ready}.new {ready}; wait"
    task = asyncio.create_task(command.run(["sh", "-c", script], what="it"))
    while not ready.exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    state = Path(f"/proc/{ready.read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().rsplit(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the grandchild lives on"
        await asyncio.sleep(0.01)


async def test_a_cancelled_thread_has_ended_when_its_waiter_goes_on() -> None:
    started, ended = threading.Event(), threading.Event()

    def work(check: Callable[[], None]) -> None:
        try:
            while True:
                started.set()
                check()
                time.sleep(0.005)
        except Interrupted:
            time.sleep(0.05)
            ended.set()
            raise

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(started.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_thread_gives_its_result_or_error() -> None:
    assert await in_thread(lambda check: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda check: 1 // 0)


async def test_a_clean_up_is_not_cut_short() -> None:
    steps: list[str] = []

    async def clean_up() -> None:
        for step in ("one", "two"):
            await asyncio.sleep(0.02)
            steps.append(step)

    task = asyncio.create_task(to_the_end(clean_up()))
    for _ in range(3):
        await asyncio.sleep(0.005)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["one", "two"]


async def test_an_error_of_a_clean_up_shows() -> None:
    async def clean_up() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await to_the_end(clean_up())
