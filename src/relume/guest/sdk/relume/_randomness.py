"""Make the random generators of a restored process its own.

Every copy of a checkpoint starts with the same memory, so a generator that lives in memory gives the same
numbers in each. What asks the kernel every time (``os.urandom``, ``secrets``, ``uuid.uuid4``) was never
affected.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import Any, NamedTuple

_NOTES = (
    "hash seed: fixed when a Python process starts, so hash() of a str is equal in every copy",
    "generators the app made itself (random.Random, numpy.random.default_rng, torch.Generator, JAX keys): "
    "reseed them in an @after_restore hook",
    "libraries with an OpenSSL of their own (cryptography, psycopg-binary): not reachable from here",
)


class Reseeded(NamedTuple):
    """What ``reseed`` did: the generators it reseeded; and, in words, what it could not and no call can do."""

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

    Never raises: under these names an app may have modules of its own, stand-ins, or ones half imported, and a
    generator that cannot be reseeded is no reason for a copy to die. It is not in ``done`` but in ``notes``,
    and told on stderr.
    """
    done = []
    failed = []
    for name, module_name, reseed_it in _GENERATORS:
        module = sys.modules.get(module_name)
        if module is None:  # not loaded, or never to be: None in sys.modules forbids an import
            continue
        try:
            reseed_it(module)
        except Exception as error:
            why = traceback.format_exception_only(type(error), error)[-1].strip()
            failed.append(f"{name}: could not be reseeded ({why})")
        else:
            done.append(name)
    for note in failed:
        # An app may have closed its stderr, or put anything in its place.
        with contextlib.suppress(Exception):
            sys.stderr.write(f"relume: {note}\n")
    return Reseeded(tuple(done), _NOTES + tuple(failed))


def _seed(module: Any) -> None:
    module.seed()


def _add_entropy(module: Any) -> None:
    fresh = os.urandom(64)
    module.RAND_add(fresh, float(len(fresh)))


_GENERATORS = (
    ("random", "random", _seed),
    ("numpy", "numpy.random", _seed),
    ("torch", "torch", _seed),
    ("openssl", "_ssl", _add_entropy),
)
