"""Threads that are there before they are needed.

An executor makes its threads when work comes. On a machine that has no memory or no process left just then, asking it
raises, and the work is carried out all the same, later, by a thread that has become free: a layer would be laid for
an instance that is gone. So all of them are made when the node starts.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from relume.errors import HostError


def pool(count: int, name: str) -> ThreadPoolExecutor:
    """An executor whose ``count`` threads all exist. Raises HostError when they cannot be made."""
    made = ThreadPoolExecutor(count, thread_name_prefix=name)
    met = threading.Barrier(count + 1)
    try:
        for _ in range(count):  # each holds a thread, so that the next one needs another
            made.submit(met.wait)
        met.wait()
    except RuntimeError as error:
        met.abort()
        raise HostError(
            f"the node cannot have its {count} threads: {error}",
            hint="is there memory, and a limit on processes (pids.max of the cgroup, ulimit -u)?",
        ) from error
    return made
