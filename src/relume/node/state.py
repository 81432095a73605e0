"""What a node remembers, in SQLite (WAL): apps with their id ranges, and instances.

Builds and checkpoints are directories that describe themselves; they are not in here. Every write is one
small transaction, so a kill at any point leaves the state before it or after it. Whatever SQLite does not do,
on a full disk first of all, is a HostError.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import secrets
import sqlite3
import time
from pathlib import Path
from typing import Any

from relume.errors import Conflict, HostError, NotFound
from relume.runc.spec import ID_COUNT

log = logging.getLogger(__name__)

_FIRST_ID = 8 * ID_COUNT
"""Below are the host's own users and what /etc/subuid hands out first; ranges go up from here."""
_LAST_ID = (1 << 32) - ID_COUNT
"""The range from here on would hold 4294967295, which stands for "no id" (chown(2))."""

_SCHEMA = """
create table if not exists meta (key text primary key, value text not null);
create table if not exists apps (
    name text primary key, build_id text, id_base integer not null unique, directory text, created_at real not null
);
create table if not exists instances (
    instance_id text primary key, app text not null, build_id text not null, state text not null,
    started_at real not null, ended_at real, facts text not null
);
create index if not exists instances_by_app on instances (app, started_at);
create table if not exists remakes (build_id text primary key, count integer not null);
"""


@dataclasses.dataclass(frozen=True, slots=True)
class App:
    """``id_base`` is the host id of root in all its instances."""

    name: str
    build_id: str | None
    id_base: int
    directory: str
    created_at: float


class State:
    """The open database, locked against a second node on the same state directory."""

    def __init__(self, directory: Path) -> None:
        """Raises Conflict when another node has it, HostError when it cannot be opened."""
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(directory / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise Conflict(
                f"another node runs on {directory}",
                hint="stop it, or give this one a state directory of its own with RELUME_STATE",
            ) from None
        try:
            (directory / "node.db").touch(mode=0o600)
            self._db = sqlite3.connect(directory / "node.db", isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = normal")
            self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            os.close(self._lock)
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> HostError:
        return HostError(
            f"the node's state cannot be read or written: {error}",
            hint=f"is the disk of {self._directory} full?",
        )

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """All rows of one statement, which is one transaction. Raises HostError."""
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def node_id(self) -> str:
        """This node's id, made once for the state directory."""
        self._execute("insert or ignore into meta values ('node_id', ?)", (secrets.token_hex(4),))
        return str(self._execute("select value from meta where key = 'node_id'")[0][0])

    # --- apps -------------------------------------------------------------------------------------

    def app(self, name: str) -> App:
        """Raises NotFound."""
        rows = self._execute("select * from apps where name = ?", (name,))
        if not rows:
            raise NotFound(f"no app {name!r}", hint="relume apps ls shows them; relume deploy makes one")
        return App(**rows[0])

    def apps(self) -> list[App]:
        return [App(**row) for row in self._execute("select * from apps order by name")]

    def ensure_app(self, name: str) -> App:
        """The app, made with an id range of its own if it is new."""
        taken = {row[0] for row in self._execute("select id_base from apps")}
        base = next(base for base in range(_FIRST_ID, _LAST_ID, ID_COUNT) if base not in taken)
        self._execute("insert or ignore into apps values (?, null, ?, '', ?)", (name, base, time.time()))
        return self.app(name)

    def set_build(self, name: str, build_id: str, directory: str) -> None:
        self._execute(
            "update apps set build_id = ?, directory = ? where name = ?", (build_id, directory, name)
        )
        # In WAL mode with synchronous = normal only this syncs: a deploy that was answered survives a power failure.
        try:
            self._execute("pragma wal_checkpoint(full)")
        except HostError as error:  # it is written all the same
            log.warning("the build of %s may not survive a power failure: %s", name, error.message)

    def remove_app(self, name: str) -> None:
        self._execute("delete from apps where name = ?", (name,))
        self._execute("delete from instances where app = ?", (name,))

    # --- instances --------------------------------------------------------------------------------

    def save_instance(
        self,
        instance_id: str,
        *,
        app: str,
        build_id: str,
        state: str,
        started_at: float,
        facts: dict[str, Any],
    ) -> None:
        """``facts`` is what the node needs to adopt it again; no secrets in it."""
        self._execute(
            "insert into instances values (?, ?, ?, ?, ?, null, ?) on conflict (instance_id) do update set"
            " state = excluded.state, started_at = excluded.started_at, facts = excluded.facts",
            (instance_id, app, build_id, state, started_at, json.dumps(facts)),
        )

    def end_instance(self, instance_id: str, state: str, exit_code: int | None) -> None:
        self._execute(
            "update instances set state = ?, ended_at = ?, facts = json_set(facts, '$.exit_code', ?)"
            " where instance_id = ?",
            (state, time.time(), exit_code, instance_id),
        )

    def instances(self) -> list[dict[str, Any]]:
        """Every remembered instance, oldest first, its facts under ``facts``."""
        rows = self._execute("select * from instances order by started_at")
        return [{**dict(row), "facts": json.loads(row["facts"])} for row in rows]

    def forget_instance(self, instance_id: str) -> None:
        self._execute("delete from instances where instance_id = ?", (instance_id,))

    def prunable(self, app: str, keep: int) -> list[str]:
        """Ended instances of ``app`` but the newest ``keep``."""
        rows = self._execute(
            "select instance_id from instances where app = ? and ended_at is not null"
            " order by started_at desc limit -1 offset ?",
            (app, keep),
        )
        return [row[0] for row in rows]

    # --- remakes ----------------------------------------------------------------------------------

    def count_remake(self, build_id: str) -> int:
        """Count one more attempt to make a new checkpoint in the background; returns how many there were."""
        self._execute(
            "insert into remakes values (?, 1) on conflict (build_id) do update set count = count + 1",
            (build_id,),
        )
        return int(self._execute("select count from remakes where build_id = ?", (build_id,))[0][0])
