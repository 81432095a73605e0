"""Ray: gRPC over loopback, a store in /dev/shm, workers forked and started anew."""

from __future__ import annotations

from ask import Ask

TITLE = "Ray, an actor and its object store"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert (answer["total"], answer["new"]) == (499_999_500_000, 1000)
    return answer["token"]
