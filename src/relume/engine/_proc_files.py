"""Files in /proc that are open, and that CRIU would not find again.

A program that reads ``/proc/thread-self/schedstat`` from time to time, as ClickHouse does for what its queries cost,
holds ``/proc/PID/task/TID/schedstat``. CRIU (4.2.1) dumps the name, and at the restore there is no such file:
threads come last, after the restorer has taken over (criu/pie/restorer.c), descriptors long before. There is one of
the process's first thread, though, with the same layout: :func:`redirect` lets the descriptor be of that.

The directory ``/proc/PID`` it writes down as ``/proc/PID/`` and what happens to stand behind that in its buffer
(criu/files-reg.c, check_path_remap, puts a slash where the string ended).

Guarantees: doing it twice changes nothing more. Does not: bring back what such a file tells of its own thread.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from relume.images import read_image

_OF_A_TASK = re.compile(r"/proc/(\d+)/task/(\d+)(/.*)?")
_OF_A_PROCESS = re.compile(r"/proc/(\d+)(/.*)?", re.DOTALL)
_FOLDERS = frozenset({"attr", "fd", "fdinfo", "map_files", "net", "ns", "task"})


def redirect(directory: Path, files: Iterable[Any]) -> tuple[bool, list[str]]:
    """Rename those among ``files`` (the entries of files.img).

    Returns whether any was, and a sentence for each process whose threads they tell of. Raises ImageError.
    """
    held = [
        (file.reg, name)
        for file in files
        if file.HasField("reg") and (name := os.fsdecode(file.reg.name)).startswith("/proc/")
    ]
    if not held:
        return False, []
    owners = {tid: item.pid for item in read_image(directory / "pstree.img") for tid in item.threads}
    changed = False
    of_threads: dict[int, list[str]] = {}
    for entry, written in held:
        name = _as_it_was(written) if stat.S_ISDIR(entry.mode) else written
        pid, instead = _of_first_thread(name, owners)
        if instead != written:
            entry.name, changed = instead, True
        if pid is not None:
            of_threads.setdefault(pid, []).append(name)
    sentences = []
    for pid, names in of_threads.items():
        (core,) = read_image(directory / f"core-{pid}.img")
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        sentences.append(
            f"files about single threads of {os.fsdecode(core.tc.comm)} (pid {pid}) are open ({names[0]}{others}): a"
            " restored copy reads there about its first thread. Open them again after the request where it matters."
        )
    return changed, sentences


def _as_it_was(directory: str) -> str:
    """A directory's name without what CRIU wrote behind it."""
    match = _OF_A_PROCESS.fullmatch(directory)
    if match is None or match[2] is None or match[2].split("/")[1] in _FOLDERS:
        return directory
    return f"/proc/{match[1]}"


def _of_first_thread(name: str, owners: Mapping[int, int]) -> tuple[int | None, str]:
    """The process, where ``name`` is of one of its other threads, and the name to open. ``owners`` are by thread."""
    if task := _OF_A_TASK.fullmatch(name):
        numbers = int(task[1]), int(task[2])
        pid = owners.get(numbers[0])  # the other may be of a thread that has ended
        if pid is not None and numbers != (pid, pid):
            return pid, f"/proc/{pid}/task/{pid}{task[3] or ''}"
    elif one := _OF_A_PROCESS.fullmatch(name):
        # The directory of a thread's number is not listed, and is there: it tells of the whole process.
        pid = owners.get(int(one[1]))
        if pid is not None and pid != int(one[1]):
            return pid, f"/proc/{pid}{one[2] or ''}"
    return None, name
