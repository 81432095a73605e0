"""Single flight across a region, by objects that are created and never overwritten.

A lease is a numbered series under one prefix: `N/0` is its N-th taking, `N/1`, `N/2`, ... are renewals,
`N/done` its end. Only one node can create `N/0`. An observer calls the owner dead when no new renewal has
appeared for the lease's time *on the observer's own monotonic clock*, and may then create `N+1/0`.

Clock skew plays no part: no time stamp is ever compared between two machines. The owner promises to renew
within a third of the lease's time by its own clock and gives up by its own clock; the observer counts from
when it saw something itself, which can only be later. What is assumed is that two monotonic clocks run at
about the same speed.

A lease alone excludes nobody: its owner may be paused past the end and wake up. What makes it safe is that N,
the *fencing token*, is part of the name of what is made under it: the late one writes generation N beside a
newer N+1, which readers prefer, and cannot replace anything.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from relume.errors import Conflict, ObjectMissing, StoreError, Superseded
from relume.store.objects import Objects

LEASE_SECONDS = 30.0
_LIMIT = 4096
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Standing:
    """What one listing says of a lease: its highest number, that one's newest renewal, and whether it is over."""

    number: int
    renewal: int
    done: bool

    @classmethod
    def of(cls, names: list[str]) -> Standing:
        """From the names below the lease's prefix, relative to it. Names of another form are ignored."""
        number = renewal = 0
        over: set[int] = set()
        for name in names:
            head, _, tail = name.partition("/")
            if not head.isdecimal():
                continue
            if tail == "done":
                over.add(int(head))
            if tail.isdecimal() or tail == "done":
                found = (int(head), int(tail) if tail.isdecimal() else 0)
                number, renewal = max((number, renewal), found)
        return cls(number, renewal, number in over or number == 0)


class Lease:
    """A lease that this process holds. `number` is its fencing token."""

    def __init__(self, leases: Leases, prefix: str, number: int, since: float) -> None:
        self.number = number
        self.prefix = prefix
        self._leases = leases
        self._renewal = 0
        self._renewed_at = since
        self._closed = threading.Event()

    def renew(self) -> None:
        """Say that the owner lives. Raises StoreError when the store cannot be told, Superseded when too late."""
        begun = self._leases.clock()
        self._leases.write(f"{self.prefix}/{self.number}/{self._renewal + 1}", {})
        self._renewal += 1
        self.check()  # a renewal that became visible after the end of the one before renews nothing
        self._renewed_at = begun
        if self._renewal > 1:  # `N/0` stays: it is what makes N taken
            self._leases.objects.delete(f"{self.prefix}/{self.number}/{self._renewal - 1}")

    def check(self) -> None:
        """Raise Superseded if others may have called this owner dead by now."""
        if self._leases.clock() - self._renewed_at > self._leases.seconds:
            raise Superseded(
                f"lease {self.number} of {self.prefix} could not be renewed for {self._leases.seconds:.0f} s",
                hint="The store was out of reach for too long; another node may have taken over.",
            )

    @contextmanager
    def kept(self) -> Iterator[Lease]:
        """Renew in the background; at the end, whatever it is, mark the lease done."""
        thread = threading.Thread(target=self._keep, name=f"lease {self.prefix}", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            thread.join()
            self.release()

    def release(self) -> None:
        """Let the next one in at once. A store that cannot be told lets it in later."""
        try:
            self._leases.write(f"{self.prefix}/{self.number}/done", {})
        except StoreError:
            pass
        self._leases.forget(self)

    def _keep(self) -> None:
        while not self._closed.wait(self._leases.seconds / 3):
            try:
                self.renew()
            except StoreError:
                continue  # check() tells the owner, when it has been too long


class Leases:
    """The leases of one store, as one node sees them. It remembers when it saw what: keep one per process."""

    def __init__(
        self, objects: Objects, owner: str, *, seconds: float = LEASE_SECONDS, clock: Clock = time.monotonic
    ) -> None:
        """`owner` is the node's id: a node that was killed and is back takes its own lease over at once."""
        self.objects = objects
        self.owner = owner
        self.seconds = seconds
        self.clock = clock
        self._seen: dict[str, tuple[Standing, float]] = {}
        self._held: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def through(self, objects: Objects) -> Leases:
        """The same, over another handle on the store: what is held, and what was seen, is held and seen by both."""
        other = copy(self)
        other.objects = objects
        return other

    def acquire(self, prefix: str, *, above: int = 0, **facts: Any) -> Lease:
        """Take the lease, or raise Conflict (`in_progress`) while another owner is alive or not known to be dead.

        Its number is higher than every one before, and than `above`; `facts` are written into it, for others to read.
        """
        standing, dead = self._look(prefix)
        if not standing.done and not dead and not self._is_mine(prefix, standing):
            raise Conflict(
                f"another instance is at it: lease {standing.number} of {prefix} is alive",
                reason="in_progress",
            )
        number = max(standing.number, above) + 1
        with self._lock:
            self._held.add((prefix, number))
        since = self.clock()
        try:
            if self.write(f"{prefix}/{number}/0", facts):
                return Lease(self, prefix, number, since)
            raise Conflict(
                f"another instance was faster: lease {number} of {prefix} is taken", reason="in_progress"
            )
        except BaseException:
            with self._lock:
                self._held.discard((prefix, number))
            raise

    def is_alive(self, prefix: str) -> bool:
        """Is somebody at it, as far as can be told? An owner seen for the first time counts as alive, but not this
        node as it was before it was killed."""
        standing, dead = self._look(prefix)
        return not standing.done and not dead and not self._is_mine(prefix, standing)

    def wait_while_alive(self, prefix: str, *, poll_s: float = 1.0) -> None:
        """Return once nobody holds the lease: it was released, or its owner is dead."""
        while self.is_alive(prefix):
            time.sleep(poll_s)

    def facts(self, prefix: str, number: int) -> dict[str, Any]:
        """What the owner of lease `number` wrote into it. Not signed: a hint, never a ground for trust."""
        try:
            found = json.loads(bytes(self.objects.get(f"{prefix}/{number}/0", limit=_LIMIT)))
        except (ObjectMissing, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, facts: dict[str, Any]) -> bool:
        """Create one lease object; True if it is ours (a nonce tells our own lost attempt from another's)."""
        body = {**facts, "owner": self.owner, "nonce": secrets.token_hex(16), "seconds": self.seconds}
        return self.objects.create(name, json.dumps(body).encode())

    def forget(self, lease: Lease) -> None:
        with self._lock:
            self._held.discard((lease.prefix, lease.number))

    def _look(self, prefix: str) -> tuple[Standing, bool]:
        """How the lease stands, and whether its owner is dead: nothing new for the lease's time."""
        asked = (
            self.clock()
        )  # the listing shows at least what was there now; a slow answer must not count as silence
        names = [info.name.removeprefix(f"{prefix}/") for info in self.objects.list(prefix)]
        standing = Standing.of(names)
        with self._lock:
            seen = self._seen.get(prefix)
            if seen is None or seen[0] != standing:
                seen = self._seen[prefix] = (standing, self.clock())
        return standing, asked - seen[1] > self.seconds

    def _is_mine(self, prefix: str, standing: Standing) -> bool:
        """Ours from before this process, so that nobody is at it. One state directory has one node (its lock)."""
        with self._lock:
            if (prefix, standing.number) in self._held:
                return False
        return self.facts(prefix, standing.number).get("owner") == self.owner
