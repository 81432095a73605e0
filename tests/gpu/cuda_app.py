"""A running ``relume.gpu.workload``, as the tests talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class App:
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, env: Mapping[str, str]) -> App:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relume.gpu.workload", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, env=env,
        )  # fmt: skip
        assert process.stdout
        await process.stdout.readline()
        return cls(process)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self.process.stdout.readline())
        assert answer.pop("ok"), answer
        return answer

    async def content(self) -> str:
        return str((await self.ask("hash"))["hash"])

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        assert self.process.stdin
        self.process.stdin.close()
        await self.process.wait()
