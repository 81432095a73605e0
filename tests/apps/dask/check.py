"""Dask: a scheduler and workers whose TCP connections to each other survive."""

from __future__ import annotations

from ask import Ask

TITLE = "Dask LocalCluster, processes over TCP"
FAST = False


def check(app: Ask) -> object:
    answer = app.json("/")
    assert answer["kept"] == 4_999_950_000, "data that the workers held"
    assert answer["squares"] == sum(n * n for n in range(100))
    assert answer["workers"] == 2
    return answer["token"]
