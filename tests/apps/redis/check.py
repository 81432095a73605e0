"""Redis, while a child of it saves the data set."""

from __future__ import annotations

import time

from ask import Ask

TITLE = "Redis 7, during BGSAVE"
FAST = True


def _command(app: Ask, line: str) -> str:
    return app.raw(f"{line}\r\n".encode(), idle=0.5).decode()


def check(app: Ask) -> object:
    token = _command(app, "GET token")
    assert token.startswith("$32\r\n"), token
    assert _command(app, "INCR visits") == ":1\r\n", "a counter of this instance's own"
    assert _command(app, "STRLEN key:1000") == ":1000\r\n"
    deadline = time.monotonic() + 40
    while "rdb_bgsave_in_progress:1" in (info := _command(app, "INFO persistence")):
        assert time.monotonic() < deadline, "the saving child never ends"
        time.sleep(0.5)
    assert "rdb_last_bgsave_status:ok" in info, info
    return token
