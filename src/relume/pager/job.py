"""What the keeper asks of a pager, and what the pager tells it: JSON, one object a line, on one socket.

To the pager: first the job (:class:`Job`), then ``{"command": "first_answer"}`` once, when the first
response left (closes the recording, starts the fill), and ``{"command": "stop"}`` (kills what is left of the
instance and ends). From it, each with ``"seconds"`` since the job came:

``listening``  CRIU may be started
``restored``   CRIU is done, the app runs
``whole``      ``bytes``, ``copy_seconds``: the processes of ``whole`` lack nothing, and no userfaultfd is on them
``replayed``   ``bytes``, ``copy_seconds``, ``ahead`` (bytes given before ``restored``), ``blocks``, ``withheld``
``recorded``   ``bytes``, ``pieces``, ``missed``, ``path``: what was learned is on disk
``answered``   the first answer left; what follows was not needed for it
``unanswered`` none left within ``record_limit_s``: the recording is over, the fill begins; ``answered`` may yet come
``filled``     ``processes`` (how many), their counters added up, ``hashed_bytes``: nothing is left, the pager ends
``gone``       the same facts, when all processes ended before that; the pager ends
``failed``     ``reason``: memory could not be served; the instance was killed before this line was written.
               ``untrusted``: because bytes were not what they must be

With ``remote`` each event but ``failed`` also has ``store_bytes`` and ``store_requests``: what this pager asked of
the region's store so far.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relume.errors import PagerError

FILLS = ("all", "demand")

CRIU_ENDED = "CRIU ended before the restore was done"
"""A ``reason`` that is no cause: why it ended, CRIU's own log says."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Where the pages of a checkpoint come from that is not whole on this node: an entry of the region's cache.

    ``state`` is the node's folder for the region, ``url`` and ``key_file`` as in node.toml, the rest names the
    checkpoint. ``patience_s`` is how long a fault waits for a store that does not answer, in seconds.
    """

    url: str
    key_file: str | None
    state: str
    node: str
    cache_bytes: int
    build: str
    platform: str
    generation: int
    patience_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """One restore.

    ``images`` is the folder of CRIU's images, ``work_dir`` CRIU's work folder, where the socket is made.
    ``working_set`` is replayed if it is there, ``record`` is where the new one goes. ``fill`` is "all" or
    "demand". ``cgroup`` is the instance's group as relume.linux.cgroup names them; without it the restored
    processes and their descendants are what is killed on a failure. ``verify`` is a folder for the memory of
    verified blocks; without it nothing is hashed. ``record_limit_s`` bounds the recording, in seconds: where no answer
    left by then, what was touched is learned only if nothing was learned before.
    ``timed`` says that the time to the first answer tells something: it does not where the instance waits.
    ``remote`` says where missing pages come from; without it the images are whole. ``whole`` are processes (pids
    in the image) that get all their memory before anybody asks for it (whole.py says who needs that). ``root`` is
    the copy's root as seen from here, in which the files lie that it has mapped; without it these come by faults
    alone.
    """

    images: Path
    work_dir: Path
    working_set: Path | None = None
    record: Path | None = None
    fill: str = "all"
    threads: int = 2
    cgroup: str | None = None
    verify: Path | None = None
    record_limit_s: float = 60.0
    timed: bool = True
    await_answer: bool = True
    remote: Remote | None = None
    whole: tuple[int, ...] = ()
    root: Path | None = None

    @classmethod
    def parse(cls, line: str) -> Job:
        """Raises PagerError for anything that is not a job."""
        try:
            fields: dict[str, Any] = json.loads(line)
            job = cls(
                images=Path(fields["images"]),
                work_dir=Path(fields["work_dir"]),
                working_set=_path(fields.get("working_set")),
                record=_path(fields.get("record")),
                fill=fields.get("fill", "all"),
                threads=int(fields.get("threads", 2)),
                cgroup=fields.get("cgroup"),
                verify=_path(fields.get("verify")),
                record_limit_s=float(fields.get("record_limit_s", 60.0)),
                timed=bool(fields.get("timed", True)),
                remote=Remote(**fields["remote"]) if fields.get("remote") else None,
                whole=tuple(int(pid) for pid in fields.get("whole", ())),
                root=_path(fields.get("root")),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise PagerError(
                f"not a job for a pager: {error!r}", hint="keeper and pager of different versions?"
            ) from error
        if job.fill not in FILLS or not 1 <= job.threads <= 64:
            raise PagerError(
                f"not a job for a pager: fill={job.fill!r} threads={job.threads}", hint="a caller's mistake"
            )
        return job

    def line(self) -> str:
        """The job as its line, without the newline; what parse reads."""
        return json.dumps(
            {
                "images": str(self.images),
                "work_dir": str(self.work_dir),
                "working_set": str(self.working_set) if self.working_set else None,
                "record": str(self.record) if self.record else None,
                "fill": self.fill,
                "threads": self.threads,
                "cgroup": self.cgroup,
                "verify": str(self.verify) if self.verify else None,
                "record_limit_s": self.record_limit_s,
                "timed": self.timed,
                "remote": dataclasses.asdict(self.remote) if self.remote else None,
                "whole": list(self.whole),
                "root": str(self.root) if self.root else None,
            }
        )


def _path(value: Any) -> Path | None:
    return None if value is None else Path(value)
