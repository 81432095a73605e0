"""Who lives on this node, and what is remembered of those who did.

Guarantees: what cannot be written, because the disk is full, keeps nothing from its end. It is written as soon as
that is possible: an instance that serves and is in no row would be ended by the node's next run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from relume.errors import HostError, NotFound
from relume.node.instance import Instance
from relume.node.places import Places
from relume.node.state import State

log = logging.getLogger(__name__)

_AGAIN = 5.0
"""Seconds between two attempts to write what could not be written."""


class Roster:
    """The living instances by id, saved so that the node's next run can adopt them."""

    def __init__(self, places: Places, state: State) -> None:
        self._places = places
        self._state = state
        self.instances: dict[str, Instance] = {}
        self._unwritten: dict[str, Callable[[], None]] = {}

    def save(self, instance: Instance) -> None:
        """Write down how it is now."""
        self._write(instance.instance_id, lambda: self._save(instance))

    def remove(self, instance: Instance) -> None:
        """It has ended: its row and its log stay."""
        del self.instances[instance.instance_id]
        in_no_row = instance.instance_id in self._unwritten

        def end() -> None:
            # An app that was removed meanwhile has taken its rows along.
            if in_no_row and any(app.name == instance.build.app for app in self._state.apps()):
                self._save(instance)
            self._state.end_instance(instance.instance_id, instance.state, instance.exit_code)

        self._write(instance.instance_id, end)

    def _save(self, instance: Instance) -> None:
        self._state.save_instance(
            instance.instance_id,
            app=instance.build.app,
            build_id=instance.build.build_id,
            state=instance.state,
            started_at=instance.started_at,
            facts=instance.facts(),
        )

    def _write(self, instance_id: str, writing: Callable[[], None]) -> None:
        """At once, or else as soon as that is possible; only the last writing about an instance counts."""
        try:
            writing()
        except HostError as error:
            if instance_id not in self._unwritten:
                log.error("%s: %s", instance_id, error.message)
            self._unwritten[instance_id] = writing
        else:
            self._unwritten.pop(instance_id, None)

    async def write_later(self) -> None:
        """Write what could not be written before, for as long as the node runs."""
        while True:
            await asyncio.sleep(_AGAIN)
            for instance_id, writing in list(self._unwritten.items()):
                self._write(instance_id, writing)

    def ended_before(self, row: dict[str, Any], exit_code: int | None) -> None:
        """The instance of a row of the node's state ended while no node ran; ``exit_code`` if that is known.

        One whose keeper is gone without it was killed.
        """
        instance_id = row["instance_id"]
        if row["state"] == "prepared":  # it never ran, so there is nothing to remember of it
            self.forget(instance_id)
            return
        ended = exit_code is not None and row["state"] in ("ready", "stopping")
        state = "exited" if ended else "failed"
        self._write(instance_id, lambda: self._state.end_instance(instance_id, state, exit_code))

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
        self._write(instance_id, lambda: self._state.forget_instance(instance_id))

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
