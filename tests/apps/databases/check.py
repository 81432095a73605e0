"""Databases in files that were open, and in the middle of something; the answer warns of the two in WAL mode."""

from __future__ import annotations

from ask import Ask

TITLE = "LMDB, DuckDB, SQLite, HDF5, watchdog: held open"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    if answer["warnings"] is not None:  # the original's answer; a copy gets none
        warnings = sorted(answer["warnings"])
        assert ["/data/cache/cache.db" in warnings[0], "/data/wal.sqlite" in warnings[1]] == [True, True]
        assert len(warnings) == 2, warnings
    return answer["token"]
