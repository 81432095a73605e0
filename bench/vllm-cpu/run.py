#!/usr/bin/env python3
"""Measure vLLM on a CPU: a cold start against starts from its checkpoint, to the first right answer over HTTP.

    RELUME_STATE=/var/lib/relume bench/vllm-cpu/run.py [--copies 3]

Deploys the app beside this file to the running node, or to a node of its own in a temporary state, and prints one
JSON line for each start: the way, seconds from the command to ready and to the answer, and whether the answer's
tokens are those of the cold start. The first deploy downloads some 400 MB. Exit status 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RELUME = HERE.parents[1] / "script" / "relume"
APP = "vllm-cpu"
QUESTION = json.dumps({"prompt": list(range(1, 65)), "max_tokens": 12}).encode()


def relume(*arguments: str) -> Any:
    done = subprocess.run([RELUME, *arguments, "-o", "json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"relume {' '.join(arguments)} failed: {done.stdout}")
    return json.loads(done.stdout) if done.stdout.strip() else None


@contextmanager
def node() -> Iterator[None]:
    """The node that runs, else one for the duration."""
    if subprocess.run([RELUME, "node", "status"], capture_output=True, check=False).returncode == 0:
        yield
        return
    state = tempfile.mkdtemp(prefix="relume-vllm-", dir="/var/tmp")
    os.environ["RELUME_STATE"] = state
    process = subprocess.Popen([RELUME, "node", "run"], stderr=subprocess.DEVNULL)
    try:
        while subprocess.run([RELUME, "node", "status"], capture_output=True, check=False).returncode != 0:
            if process.poll() is not None:
                sys.exit("the node does not come up: run `script/relume doctor`")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(state)


def measure(way: str, *flags: str) -> tuple[dict[str, Any], list[int]]:
    """Start an instance, ask it once; what it took, and the tokens."""
    began = time.monotonic()
    started = relume("start", APP, *flags)
    ready = time.monotonic()
    request = urllib.request.Request(f"{started['url']}/generate", QUESTION)
    with urllib.request.urlopen(request, timeout=600) as response:
        tokens: list[int] = json.loads(response.read())["result"]["tokens"]
    answered = time.monotonic()
    row = {"way": way, "restored": started["restored"], "instance_id": started["instance_id"]}
    return row | {"ready_s": round(ready - began, 3), "answer_s": round(answered - began, 3)}, tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copies", type=int, default=3, help="starts from the checkpoint (3)")
    options = parser.parse_args()
    equal = True
    with node():
        relume("deploy", str(HERE), "-y")
        try:
            # The first start makes the checkpoint before it serves; the cold time is that of one that makes none.
            first, expected = measure("cold, with the checkpoint")
            print(json.dumps(first), flush=True)
            relume("stop", first["instance_id"])
            rows = [("cold", ["--no-restore"])] + [("restored", [])] * options.copies
            for way, flags in rows:
                row, tokens = measure(way, *flags)
                row["same_tokens"] = tokens == expected
                equal = equal and row["same_tokens"] and row["restored"] == (way == "restored")
                print(json.dumps(row), flush=True)
                relume("stop", row["instance_id"])
            for checkpoint in relume("checkpoints", "ls"):
                if checkpoint["app"] == APP:
                    found = relume("checkpoints", "inspect", checkpoint["checkpoint_id"])
                    facts = {key: found[key] for key in ("size_bytes", "frozen_ms")}
                    print(json.dumps({"way": "checkpoint", "processes": len(found["processes"])} | facts))
        finally:
            relume("apps", "rm", APP)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
