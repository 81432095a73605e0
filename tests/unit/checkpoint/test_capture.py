"""What is looked at before a dump, and what the dump is then given."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from relume.checkpoint import capture
from relume.checkpoint.capture import Capturer, Expected, Subject
from relume.checkpoint.shelf import Shelf

from .conftest import PLATFORM

MB = 1 << 20


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """An instance without processes, 100 MB in its writable layer."""
    upper = tmp_path / "upper"
    upper.mkdir()
    with (upper / "weights").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100 * MB)
    return Subject(
        instance_id="i-1",
        app="a",
        build_id="b1",
        keeper=cast("Any", SimpleNamespace(container=SimpleNamespace(runtime=str(tmp_path)))),
        upper=upper,
        rootfs=upper,
        cgroup="/relume-none",
        id_base=524288,
        checkpointing=True,
        restored=False,
        deferred=False,
        loopback="keep",
        filesystem="all",
        held_limit=1 << 30,
    )


def test_files_count_for_the_room_and_for_the_time(
    subject: Subject, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturer = Capturer(shelf, PLATFORM, cast("Any", None))
    monkeypatch.setattr(capture, "_free", lambda shelf: 50 * MB)
    refused = capturer._look_at_host(subject, 0)
    assert isinstance(refused, dict)
    assert (refused["status"], refused["reason"]) == ("failed", "insufficient_disk")

    monkeypatch.setattr(capture, "_free", lambda shelf: 500 * MB)
    expected = capturer._look_at_host(subject, 0)
    assert isinstance(expected, Expected)
    assert expected.files >= 100 * MB
    assert expected.memory < MB

    _, intent = shelf.begin(instance_id="i-1", app="a", build_id="b1", now=1.0)
    directory = tmp_path / "made"
    directory.mkdir()
    job = capturer._job(subject, intent, directory, expected)
    assert job.timeout >= 32  # 2 s for 100 MB, at the slowest


def test_names_that_are_no_utf8_can_be_read_by_everybody(subject: Subject) -> None:
    name = os.fsdecode(b"/caf\xe9")
    answer = capture._answer(subject, "failed", "unsupported", unsupported=[{"process": name, "pid": 7}])
    assert answer["unsupported"] == [{"process": "/caf\ufffd", "pid": 7}]
    json.dumps(answer, ensure_ascii=False).encode()
