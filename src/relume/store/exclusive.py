"""Is the store's create-if-absent really exclusive? Leases and manifests stand on it.

There are S3 servers that take `If-None-Match: *` and overwrite all the same. On such a store two nodes would
both own a lease and a late writer could replace a manifest, with no error anywhere. So a node proves it at
start, with the store it was given, and refuses to share one that fails.
"""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

from relume.errors import StoreError
from relume.store.objects import Objects

_RIVALS = 8

NOT_EXCLUSIVE = "not_exclusive"
"""``reason`` in the error's details, where the store answered and failed the test; another says nothing of it."""


def prove_exclusive(objects: Objects) -> None:
    """Raise StoreError, with the reason and a remedy, unless exactly one of several creators wins."""
    name = f"probe/{secrets.token_hex(16)}"
    bodies = [f"{name} {rival}".encode() for rival in range(_RIVALS)]
    with ThreadPoolExecutor(_RIVALS) as pool:
        made = list(pool.map(lambda body: objects.create(name, body), bodies))
    won = [body for body, first in zip(bodies, made, strict=True) if first]
    late = objects.create(name, b"late " + bodies[0])
    kept = objects.get(name, limit=4096)
    objects.delete(name)
    if late or len(won) != 1 or kept != won[0]:
        what = (
            "replaced an object that existed"
            if late or len(won) <= 1
            else f"let {len(won)} of {_RIVALS} creators win"
        )
        raise StoreError(
            f"{objects.url} ignores create-if-absent (PUT with If-None-Match: *): it {what}",
            hint="Checkpoints of several nodes would overwrite each other. Use a store that honours conditional "
            "writes (Amazon S3, Google Cloud Storage, Azure, MinIO), or a directory on one machine.",
            reason=NOT_EXCLUSIVE,
        )
