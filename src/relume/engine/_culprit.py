"""Who makes a checkpoint impossible, with what, and what to do about it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Culprit:
    """One thing that one process does or has. ``pid`` is the pid inside; 0 where no process is to name.

    ``what`` continues a sentence that begins with the process ("holds an io_uring ring"); ``hint`` says
    what to change, in the app or in its configuration.
    """

    pid: int
    process: str
    what: str
    hint: str

    def as_dict(self) -> dict[str, int | str]:
        """The form in which answers carry it."""
        return {"pid": self.pid, "process": self.process, "what": self.what, "hint": self.hint}

    def __str__(self) -> str:
        name = f"{self.process} (pid {self.pid})" if self.pid else self.process
        return f"{name} {self.what}".lstrip()
