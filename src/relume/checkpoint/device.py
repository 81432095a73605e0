"""The GPU's part of a checkpoint and of a restore, for instances that were given one.

relume.gpu has the driver's stories; here they meet the engine's: device memory is put away before the dump and
given back after it, in the same call, whatever the dump came to; what was done lies in the dump's ``work`` from
before the freeze on, so that a node that is killed in between leaves it to the next one.

Nothing of relume.gpu is imported before an instance with a GPU comes by.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relume.engine.jobs import DumpResult

if TYPE_CHECKING:
    from relume.gpu import GpuCheckpointer, Suspended

_NOTE = "gpu.json"


@dataclasses.dataclass(frozen=True, slots=True)
class GpuShare:
    """The GPUs that an instance was given: what its checkpoint has to say of them, and what a restart must know.

    ``facts`` go into the platform (relume.gpu.platform). ``nodes`` are its device nodes by path, ``made`` the
    paths in its root that CDI's hooks make at a boot and nobody makes in a copy.
    """

    uuids: tuple[str, ...]
    model: str
    facts: tuple[str, ...]
    nodes: tuple[str, ...]
    made: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GpuShare:
        """The inverse of ``as_dict``, from JSON; other keys are left out."""
        names = ("uuids", "facts", "nodes", "made")
        return cls(model=raw["model"], **{name: tuple(raw[name]) for name in names})


class DeviceMemory:
    """Both stories, over the node's one driver. ``checkpointer`` gives it when it is needed, and not before."""

    def __init__(self, checkpointer: Callable[[], GpuCheckpointer]) -> None:
        self._checkpointer = checkpointer

    async def examine(
        self, pids: Sequence[int], *, memory_limit: int | None, host_bytes: int, available_bytes: int
    ) -> int:
        """Bytes of device memory that a checkpoint of ``pids`` would put away. Changes nothing.

        Raises GpuUnsupported, GpuMemory and the driver's other GpuErrors: then it would not work.
        """
        from relume.gpu import preflight

        budget = await preflight(
            self._checkpointer().driver,
            pids,
            memory_limit=memory_limit,
            host_bytes=host_bytes,
            available_bytes=available_bytes,
        )
        return budget.device_bytes

    async def around(
        self,
        share: GpuShare,
        pids: Sequence[int],
        work: Path,
        dump: Callable[[], Coroutine[Any, Any, DumpResult]],
    ) -> DumpResult:
        """``dump`` with the device memory of ``pids`` in their host memory; it is back when this returns or raises.

        ``work`` gets the record (:func:`record_of`). Raises GpuLost when the processes cannot be brought
        back, other GpuErrors with all of them running as before, and what ``dump`` raises.
        """
        checkpointer = self._checkpointer()
        suspended = await checkpointer.suspend(pids)
        dumping: asyncio.Task[DumpResult] | None = None
        try:
            _write_record(work, share, suspended)
            dumping = asyncio.create_task(dump())
            return await asyncio.shield(dumping)
        finally:
            # The driver works through a thread of the process, so nothing can be given back to one that is
            # frozen: a node that is ending waits for the dump, too.
            if dumping is not None:
                await asyncio.wait([dumping])
            await checkpointer.resume(suspended)

    async def recover(self, pids: Sequence[int]) -> None:
        """Bring back what an earlier run of the node left suspended; to be called when no dump goes on.

        Raises GpuLost when that does not work."""
        await self._checkpointer().recover(pids)

    async def restore(
        self, pids: Sequence[int], gpu_map: Mapping[str, str], record: Mapping[str, Any]
    ) -> None:
        """Give a copy that runs its device memory, as ``record`` says. Raises GpuError: the copy is of no use."""
        from relume.gpu.story import needed

        saved = record["processes"]
        needs = needed((process["gpus"], process["device_bytes"]) for process in saved)
        await self._checkpointer().restore(pids, gpu_map, expected=len(saved), needs=needs)


def _write_record(work: Path, share: GpuShare, suspended: Suspended) -> None:
    (work / _NOTE).write_text(json.dumps(share.as_dict() | suspended.as_dict()))


def record_of(work: Path) -> dict[str, Any]:
    """The record of the device memory in a dump, {} without one; for Checkpoint.gpu."""
    try:
        record: dict[str, Any] = json.loads((work / _NOTE).read_text())
    except FileNotFoundError:
        return {}
    return record
