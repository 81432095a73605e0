"""What keepers tell of their instances, and what follows from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from relume.node.background import Background
from relume.node.ending import Ending
from relume.node.failures import Failures
from relume.node.instance import Instance
from relume.node.requests import Requests
from relume.node.roster import Roster

if TYPE_CHECKING:
    from relume.node.region import NodeRegion

log = logging.getLogger(__name__)


class Hearing:
    """Listens to every keeper of one node."""

    def __init__(
        self,
        roster: Roster,
        ending: Ending,
        requests: Requests,
        failures: Failures,
        background: Background,
        region: NodeRegion | None,
        *,
        finish_copy: Callable[[Instance], None],
    ) -> None:
        self._roster = roster
        self._ending = ending
        self._requests = requests
        self._failures = failures
        self._background = background
        self._region = region
        self._finish_copy = finish_copy

    def listen(self, instance: Instance) -> None:
        """From now on what its keeper tells is heard, its death included."""
        instance.keeper.on_event = lambda event: self.heard(instance, event)
        self._background.spawn(self._ending.watch_keeper(instance))

    def heard(self, instance: Instance, event: dict[str, Any]) -> None:
        """One event (relume.keeper.instance has what there are)."""
        match event["event"]:
            case "ready":
                instance.timeline = event["timeline"] | {"answers": event["at"]}
                instance.ready.set()
                if instance.state == "starting":
                    instance.state = "ready"
                    self._roster.save(instance)
            case "pager":
                self._pager_told(instance, event["told"])
            case "failed" if instance.adopted:
                self._background.spawn(self._ending.discard(instance, "failed"))
            case "request" if event["request"] not in instance.asked:
                instance.asked.add(event["request"])
                self._background.spawn(self._requests.answer(instance, event["request"]))
            case "exit":
                instance.exit_code = event["exit_code"]
                self._background.spawn(self._ending.over(instance))

    def _pager_told(self, instance: Instance, told: dict[str, Any]) -> None:
        """Memory that could not be served has ended the instance; after it was ready, another takes its place."""
        if self._region is not None:
            self._region_hears(self._region, instance, told)
        if told["event"] in ("whole", "filled"):
            instance.whole.set()
        if told["event"] != "failed":
            return
        log.error("paging of %s failed: %s", instance.instance_id, told["reason"])
        instance.paging_failed = str(told["reason"])
        instance.wrong_bytes = bool(told.get("untrusted"))
        if instance.ready.is_set() and instance.checkpoint_id is not None:
            self._background.spawn(self._failures.replace(instance))

    def _region_hears(self, region: NodeRegion, instance: Instance, told: dict[str, Any]) -> None:
        """What came from the store before the first answer; when the copy can do without; what was learned."""
        copy = instance.copy
        if copy is not None and "store_bytes" in told and not instance.answered:
            instance.from_store = {
                "store_bytes": copy.store_bytes + told["store_bytes"],
                "store_requests": copy.store_requests + told["store_requests"],
            }
        match told["event"]:
            case "answered":
                instance.answered = True
                if copy is not None:
                    log.info("%s answers: %s", instance.instance_id, instance.from_store)
                    if instance.settings.fill != "all":
                        self._finish_copy(instance)
            case "filled" | "gone":
                self._finish_copy(instance)
            case "unanswered" if instance.settings.fill != "all":
                self._finish_copy(instance)
            case "recorded" if instance.checkpoint_id is not None and copy is None:
                region.learned(instance.checkpoint_id)
