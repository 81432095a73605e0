"""The demonstration: one model server started cold and started from its checkpoint, both timed from outside.

Runs a node of its own, apart from any other on the machine, and takes it down again whatever happens: no
process, mount or namespace of it is left, also after Ctrl-C, and that is looked at before the end. What does
stay is the build (under STATE), so that a second run does not install JAX again.

Both times run from the `relume start` command line to the first right answer over HTTP. The cold time is that
of a start that makes no checkpoint, so that making it does not count against the cold start.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RELUME = ROOT / ".venv/bin/relume"
STATE = Path("/var/cache/relume/demo")
APP = "jax-server"
QUESTION = {"prompt": "The quick brown fox", "tokens": 4}
RESTORED_LINE = "CEREBRIUM_RESTORED: container restored from checkpoint"


class DemoError(Exception):
    """What went wrong, for a person to read; the details are on stderr already."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the app, from the command line to its first answer (seconds)."""

    instance_id: str
    restored: bool
    seconds: float
    tokens: list[int]


def say(line: str = "") -> None:
    print(line, file=sys.stderr, flush=True)


def relume(*arguments: str, timeout: float = 600) -> Any:
    """Runs one relume command; its JSON output, None where it printed none. Its progress goes to our stderr.

    In a session of its own: Ctrl-C in the terminal is for this program, which stops everything in order.
    """
    command = [str(RELUME), *arguments]
    env = environment()
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, env=env) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise DemoError(f"`relume {' '.join(arguments)}` failed: {output.decode(errors='replace').strip()}")
    return json.loads(output) if output.strip() else None


def environment() -> dict[str, str]:
    return os.environ | {"RELUME_STATE": str(STATE)}


class Node:
    """A node process with STATE. Raises DemoError where it does not start."""

    def __init__(self) -> None:
        STATE.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._log = STATE / "demo-node.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(RELUME), "node", "run"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment(),
            )

    def wait(self) -> str:
        """The node's id, once it answers."""
        deadline = time.monotonic() + 60
        command = [str(RELUME), "node", "status", "-o", "json"]
        while True:
            asked = subprocess.run(command, capture_output=True, env=environment())
            if asked.returncode == 0:
                return str(json.loads(asked.stdout)["node_id"])
            if self._process.poll() is not None or time.monotonic() > deadline:
                say(self._log.read_text(errors="replace")[-4000:])
                raise DemoError("the node did not start; its log is above")
            time.sleep(0.1)

    def end(self) -> None:
        """Instances would live on: remove them first."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running_node() -> Iterator[None]:
    """A node while the block runs. Afterwards its instances and checkpoints are gone, and nothing is left.

    Raises DemoError where something is, in spite of all.
    """
    node = Node()
    node_id = ""
    try:
        node_id = node.wait()
        remove_everything()  # a demo that was killed outright leaves what the node has adopted again by now
        yield
    finally:
        # From here on a second Ctrl-C would only leave things behind. Every step has a time limit.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        take_down(node, node_id)


def take_down(node: Node, node_id: str) -> None:
    """End the node and all that is its own.

    A start that was cut short may come up when the list of instances was read already. A node that is
    started again finds it: that is what a node does with what an earlier run left.
    """
    left = []
    for attempt in range(3):
        with contextlib.suppress(DemoError, subprocess.TimeoutExpired):
            if attempt:
                node = Node()
                node.wait()
            remove_everything()
        node.end()
        if not node_id or not (left := left_behind(node_id)):
            return
    raise DemoError("\n  ".join(["left behind:", *left]))


def remove_everything() -> None:
    for instance in relume("ps", "-o", "json", timeout=30) or []:
        if instance["state"] not in ("exited", "failed"):
            relume("stop", instance["instance_id"], "-o", "json", timeout=60)
    for checkpoint in relume("checkpoints", "ls", "-o", "json", timeout=30) or []:
        relume("checkpoints", "rm", checkpoint["checkpoint_id"], "-o", "json", timeout=60)


def timed_start(*flags: str) -> Start:
    began = time.monotonic()
    started = relume("start", APP, *flags, "-o", "json")
    tokens = ask(started["url"])
    seconds = time.monotonic() - began
    if started.get("reason") and "--no-restore" not in flags:
        say(f"  relume says: {started['reason']}")
    return Start(started["instance_id"], started["restored"], seconds, tokens)


def ask(url: str) -> list[int]:
    """The model's answer to QUESTION. The app is ready by now: an error is an error."""
    body = json.dumps(QUESTION).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/generate", data=body, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            tokens = json.load(response)["tokens"]
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
        raise DemoError(f"the app did not answer at {url}: {error}") from error
    if not isinstance(tokens, list) or len(tokens) != QUESTION["tokens"]:
        raise DemoError(f"the app's answer is no list of {QUESTION['tokens']} tokens: {tokens!r}")
    return tokens


def stop(start: Start) -> None:
    relume("stop", start.instance_id, "-o", "json")


def first_start() -> Start:
    """The start that makes the checkpoint: the app asks for it before it serves."""
    first = timed_start("--no-restore")
    deadline = time.monotonic() + 60
    while not has_checkpoint():
        if time.monotonic() > deadline:
            subprocess.run([RELUME, "logs", first.instance_id], stdout=sys.stderr, env=environment())
            raise DemoError("the app's checkpoint is not there; what the app said is above")
        time.sleep(0.2)
    return first


def has_checkpoint() -> bool:
    listed = relume("checkpoints", "ls", "-o", "json")
    return any(row["app"] == APP and row["state"] == "ready" for row in listed)


def restored_start() -> Start:
    start = timed_start()
    log = subprocess.run([RELUME, "logs", start.instance_id], capture_output=True, env=environment()).stdout
    if not start.restored or log.decode(errors="replace").split("\n")[0] != RESTORED_LINE:
        say(log.decode(errors="replace"))
        raise DemoError("the app was not started from its checkpoint; its log is above")
    return start


def bars(rows: list[tuple[str, float]]) -> None:
    block = "█" if (sys.stderr.encoding or "").lower().startswith("utf") else "#"
    longest = max(seconds for _, seconds in rows)
    say()
    for label, seconds in rows:
        say(f"  {label:<34} {block * max(1, round(40 * seconds / longest))} {seconds:.2f} s")
    say()


def demonstrate() -> dict[str, Any]:
    say(f"Deploying examples/{APP} ...")
    deployed = relume("deploy", str(ROOT / "examples" / APP), "-y", "-o", "json", timeout=1200)
    say(f"  build {deployed['build_id'][:12]}, {deployed['seconds']:.1f} s")

    say("First start: makes 0.6 GB of weights, compiles, and asks for a checkpoint ...")
    first = first_start()
    stop(first)
    say("Cold start: the same once more, with no checkpoint to make ...")
    cold = timed_start("--no-restore")
    stop(cold)
    say("Start from the checkpoint ...")
    restored = restored_start()
    stop(restored)
    if not first.tokens == cold.tokens == restored.tokens:
        raise DemoError(f"answers differ: {first.tokens}, cold {cold.tokens}, restored {restored.tokens}")
    say(f"All three gave the same answer: {restored.tokens}")

    bars(
        [
            ("first start, makes the checkpoint", first.seconds),
            ("cold start", cold.seconds),
            ("from the checkpoint", restored.seconds),
        ]
    )
    return {
        "app": APP,
        "cold_s": round(cold.seconds, 3),
        "restored_s": round(restored.seconds, 3),
        "ratio": round(cold.seconds / restored.seconds, 1),
    }


def left_behind(node_id: str) -> list[str]:
    """Processes, mounts, control groups that are the node's. Namespaces go with the processes and mounts."""
    marks = (str(STATE), f"/run/relume/{node_id}")
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if any(mark in command for mark in marks):
                    found.append(f"process {process.name}: {command.strip()}")
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [f"mount: {line}" for line in mounts if any(mark in line for mark in marks)]
    for pattern in (f"relume/{node_id}/*/", f"*/relume/{node_id}/*/"):
        found += [f"control group: {group}" for group in Path("/sys/fs/cgroup").glob(pattern)]
    return found


def on_signal(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main() -> int:
    argparse.ArgumentParser(prog="script/demo", description=__doc__.partition("\n")[0]).parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        with running_node():
            result = demonstrate()
    except KeyboardInterrupt:
        say("stopped; everything was taken down")
        return 130
    except (DemoError, subprocess.TimeoutExpired) as error:
        say(f"error: {error}")
        return 1
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
