"""Make the random generators of a restored process its own.

Every copy of a checkpoint starts with the same memory, so a generator that lives in memory gives the same
numbers in each. What asks the kernel every time (``os.urandom``, ``secrets``, ``uuid.uuid4``) was never
affected.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

_NOTES = (
    "hash seed: fixed when a Python process starts, so hash() of a str is equal in every copy",
    "generators the app made itself (random.Random, numpy.random.default_rng, torch.Generator, JAX keys): "
    "reseed them in an @after_restore hook",
    "libraries with an OpenSSL of their own (cryptography, psycopg-binary): not reachable from here",
)


class Reseeded(NamedTuple):
    """What ``reseed`` did: the generators it reseeded, and what no call can do, in words."""

    done: tuple[str, ...]
    notes: tuple[str, ...] = _NOTES


def reseed() -> Reseeded:
    """Reseed, from the kernel, every generator of this process that is known and loaded.

    - ``random``: the module's functions.
    - ``numpy``: the legacy global state (``numpy.random.seed`` and its kin).
    - ``torch``: the default generators of the CPU and of every device.
    - ``openssl``: the generator behind ``ssl``. OpenSSL notices a fork by the pid, and every copy has the
      pid of the original, so it notices nothing by itself. RAND_add makes its primary generator, which
      every thread's draws from, take new entropy (RAND_add(3), OpenSSL 1.1.1 and newer).

    Modules that are not loaded are left alone. A generator that was seeded for repeatable results is
    reseeded as well: seed it again afterwards.
    """
    done = []
    if "random" in sys.modules:
        sys.modules["random"].seed()
        done.append("random")
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
        done.append("numpy")
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
        done.append("torch")
    if "_ssl" in sys.modules:
        fresh = os.urandom(64)
        sys.modules["_ssl"].RAND_add(fresh, float(len(fresh)))
        done.append("openssl")
    return Reseeded(tuple(done))
