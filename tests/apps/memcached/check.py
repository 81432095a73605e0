"""memcached under its own user; the request is made by bash."""

from __future__ import annotations

from ask import Ask

TITLE = "memcached"
FAST = False


def check(app: Ask) -> object:
    token = app.raw(b"get token\r\n", idle=0.5)
    assert token.startswith(b"VALUE token 0 32\r\n"), token
    assert app.raw(b"incr visits 1\r\n", idle=0.5) == b"1\r\n", "a counter of this instance's own"
    return token.decode()
