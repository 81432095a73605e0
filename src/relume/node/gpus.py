"""The GPUs of this node: who has which, what a container with one needs, and the one driver for all of them.

Apps without a GPU come by here and find nothing to do: nothing of relume.gpu is imported, and no helper process
is started, until an app asks for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relume.checkpoint.device import DeviceMemory, GpuShare
from relume.checkpoint.platform import NO_GPU, Offers
from relume.errors import GpuUnavailable, RelumeError
from relume.linux import cgroup

if TYPE_CHECKING:
    from relume.gpu import DriverHelper, GpuCheckpointer, Machine
    from relume.gpu.cdi import OciEdits

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """What an instance was given: its ``share``, and the ``edits`` of its OCI config.

    For a copy, ``gpu_map`` leads from the checkpoint's GPUs to its own; ``new_nodes`` are to be added to it and
    ``old_nodes`` taken away.
    """

    share: GpuShare
    edits: OciEdits
    gpu_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    new_nodes: tuple[str, ...] = ()
    old_nodes: tuple[str, ...] = ()


class Gpus:
    """Gives the machine's GPUs to instances, one instance a GPU."""

    def __init__(self, cdi_folders: Sequence[Path]) -> None:
        self._folders = cdi_folders
        self._helper: DriverHelper | None = None
        self._held: dict[str, tuple[str, ...]] = {}
        self.memory = DeviceMemory(self._checkpointer)

    async def close(self) -> None:
        """End the helper process, if there is one; instances keep what they have."""
        if self._helper is not None:
            await self._helper.close()

    def _driver(self) -> DriverHelper:
        from relume.gpu import DriverHelper

        if self._helper is None:
            self._helper = DriverHelper()
        return self._helper

    def _checkpointer(self) -> GpuCheckpointer:
        from relume.gpu import GpuCheckpointer

        return GpuCheckpointer(self._driver())

    async def most(self, compute: Sequence[str]) -> int:
        """How many GPUs of one model in ``compute`` an instance could get at best. Raises GpuUnavailable when
        the helper does not start."""
        machine = await self._driver().survey()
        models = [gpu.model for gpu in machine.gpus if not gpu.mig and gpu.model in _models(machine, compute)]
        return max((models.count(model) for model in models), default=0)

    async def offers(self, compute: Sequence[str], count: int) -> Offers:
        """What the GPUs that are free now come to in a platform, for each model that fits; without a GPU in the
        wish, one offer of none."""
        if not count:
            return NO_GPU
        from relume.gpu import models, platform

        try:
            machine = await self._driver().survey()
        except RelumeError as error:
            log.warning("no GPU to give: %s", error.message)
            return ()
        offers = []
        for model in _models(machine, compute):
            with contextlib.suppress(GpuUnavailable):
                gpus = models.choose(machine, compute, count, self._taken(), model=model)
                offers.append(platform.facts(machine, gpus))
        return tuple(offers)

    async def give(
        self, instance_id: str, compute: Sequence[str], count: int, record: Mapping[str, Any] | None = None
    ) -> Grant:
        """Free GPUs for an instance, which has them until :meth:`take_back`. Raises GpuUnavailable.

        ``record`` is that of the checkpoint (relume.checkpoint.device) that the instance will be a copy of.
        """
        from relume.gpu import cdi, models, platform

        machine = await self._driver().survey()
        saved = GpuShare.from_dict(record) if record else None
        gpus = models.choose(
            machine,
            compute,
            count,
            self._taken(),
            model=saved.model if saved else "",
            prefer=saved.uuids if saved else (),
        )
        edits = cdi.edits_for(cdi.load(self._folders), gpus)
        share = GpuShare(
            uuids=tuple(gpu.uuid for gpu in gpus),
            model=gpus[0].model,
            facts=platform.facts(machine, gpus),
            nodes=edits.nodes,
            made=edits.made,
        )
        gpu_map = models.pair(saved.uuids, gpus) if saved else {}
        new_nodes: tuple[str, ...] = ()
        old_nodes: tuple[str, ...] = ()
        if saved:
            edits, new_nodes, old_nodes = cdi.for_copy(edits, saved.nodes)
        self.hold(instance_id, share)
        return Grant(share, edits, gpu_map, new_nodes, old_nodes)

    def hold(self, instance_id: str, share: GpuShare) -> None:
        """The instance has these: nobody else gets them."""
        self._held[instance_id] = share.uuids

    def take_back(self, instance_id: str) -> None:
        """The instance is gone. Nothing happens for one that had none."""
        self._held.pop(instance_id, None)

    def _taken(self) -> set[str]:
        return {uuid for uuids in self._held.values() for uuid in uuids}

    async def revive(self, grant: Grant, pid: int, group: str, record: Mapping[str, Any]) -> None:
        """Give a copy that runc has just restored its device memory: its init is ``pid``, its cgroup ``group``.

        Raises GpuError: the copy is of no use then.
        """
        from relume.gpu import nodes

        await nodes.change(pid, grant.new_nodes, grant.old_nodes)
        await self.memory.restore(cgroup.processes(group), grant.gpu_map, record)


def _models(machine: Machine, compute: Sequence[str]) -> list[str]:
    """The machine's models that fit, those of the first wish first."""
    from relume.gpu.models import matches

    return list(
        dict.fromkeys(gpu.model for wanted in compute for gpu in machine.gpus if matches(gpu, wanted))
    )
