"""Jobs survive their line; what is not a job is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.errors import PagerError
from relume.pager.job import Job, Remote


def test_a_job_survives_its_line() -> None:
    job = Job(
        Path("/i"), Path("/w"), Path("/s"), Path("/r"), "demand", 3, "/relume/a", Path("/v"), 5.0, False
    )
    assert Job.parse(job.line()) == job
    assert Job.parse(Job(Path("/i"), Path("/w")).line()) == Job(Path("/i"), Path("/w"))
    remote = Job(Path("/i"), Path("/w"), remote=Remote("file:///r", "/k", "/state", "n", 1, "b", "p", 2, 3.0))
    assert Job.parse(remote.line()) == remote
    whole = Job(Path("/i"), Path("/w"), whole=(1, 17))
    assert Job.parse(whole.line()) == whole


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[]",
        '{"images": "/i", "work_dir": "/w", "fill": "some"}',
        '{"images": "/i", "work_dir": "/w", "threads": 0}',
    ],
)
def test_anything_else_is_refused(line: str) -> None:
    with pytest.raises(PagerError, match="not a job"):
        Job.parse(line)
