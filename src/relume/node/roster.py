"""Who lives on this node, and what is remembered of those who did.

Guarantees: what cannot be written, because the disk is full, keeps nothing from its end; the next writing, or the
next run of the node, mends it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from relume.errors import HostError, NotFound
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.state import State

log = logging.getLogger(__name__)


class Roster:
    """The living instances by id, saved so that the node's next run can adopt them."""

    def __init__(self, places: Places, state: State) -> None:
        self._places = places
        self._state = state
        self.instances: dict[str, Instance] = {}

    def save(self, instance: Instance) -> None:
        """Write down how it is now."""
        with _said(instance.instance_id):
            self._state.save_instance(
                instance.instance_id,
                app=instance.build.app,
                build_id=instance.build.build_id,
                state=instance.state,
                started_at=instance.started_at,
                facts=instance.facts(),
            )

    def remove(self, instance: Instance) -> None:
        """It has ended: its row and its log stay."""
        del self.instances[instance.instance_id]
        with _said(instance.instance_id):
            self._state.end_instance(instance.instance_id, instance.state, instance.exit_code)

    def find(self, target: str) -> list[Instance]:
        """The living instances that ``target`` (an instance id or an app) names. Raises NotFound."""
        if target in self.instances:
            return [self.instances[target]]
        found = [instance for instance in self.instances.values() if instance.build.app == target]
        if not found:
            raise NotFound(f"no running instance or app {target!r}", hint="relume ps shows what runs")
        return found

    def log_of(self, target: str) -> Path:
        """The log of an instance, or of an app's newest instance. Raises NotFound."""
        for row in reversed(self._state.instances()):
            if target in (row["instance_id"], row["app"]) and not row["facts"].get("maker"):
                return self._places.instance(row["instance_id"]).log
        raise NotFound(f"no instance or app {target!r}", hint="relume ps shows the instances")

    def forget(self, instance_id: str) -> None:
        """Remove the row of an ended instance, and its log."""
        shutil.rmtree(self._places.instance(instance_id).kept, ignore_errors=True)
        with _said(instance_id):
            self._state.forget_instance(instance_id)

    def prune(self, app: str, keep: int) -> None:
        """Forget ended instances of ``app`` but the newest ``keep``, with their logs."""
        with _said(f"ended instances of {app}"):
            for instance_id in self._state.prunable(app, keep):
                self.forget(instance_id)


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """A state that cannot be written is said, and no more."""
    try:
        yield
    except HostError as error:
        log.error("%s: %s", what, error.message)
