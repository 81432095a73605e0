"""Checkpoints as directories: what a reader sees at every moment, and what stays after a crash at any."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from relume.checkpoint import shelf as module
from relume.checkpoint.shelf import Health, Shelf, size_of
from relume.errors import NotFound


class Crash(BaseException):
    """The machine stops here."""


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def test_from_the_intent_to_the_shelf(shelf: Shelf, begun: Any, checkpoint_of: Any) -> None:
    directory, intent = begun()
    assert shelf.unfinished() == [intent]
    assert shelf.all() == []
    checkpoint = checkpoint_of(intent)
    shelf.publish(intent.dump_id, checkpoint)
    assert shelf.load(checkpoint.checkpoint_id) == checkpoint
    assert shelf.all() == shelf.of_build("b1") == [checkpoint]
    assert shelf.of_build("b2") == [] and shelf.unfinished() == []
    assert not directory.exists()
    images = shelf.directory(checkpoint.checkpoint_id) / "images"
    assert (images.stat().st_mode & 0o777, (images / "pages-1.img").stat().st_mode & 0o777) == (0o750, 0o640)
    assert shelf.root.stat().st_mode & 0o777 == 0o700


# Each of these is a moment of publish() at which the machine may stop.
MOMENTS = ["close_to_others", "_sync_tree", "_sync", "rename"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_while_publishing(
    shelf: Shelf, begun: Any, checkpoint_of: Any, monkeypatch: pytest.MonkeyPatch, moment: str, after: bool
) -> None:
    """A reader sees all of it or nothing, and a restarted node can take away or use what is left."""
    _, intent = begun()
    checkpoint = checkpoint_of(intent)
    target: Any = Path if moment == "rename" else module
    original = getattr(target, moment)

    def crash(*arguments: Any) -> None:
        if after:
            original(*arguments)
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(target, moment, crash)
        with pytest.raises(Crash):
            shelf.publish(intent.dump_id, checkpoint)
    again = Shelf(shelf.root)
    assert again.all() in ([], [checkpoint])
    if again.all():
        assert (again.directory(checkpoint.checkpoint_id) / "images" / "pages-1.img").read_bytes() == b"abc"
        assert again.unfinished() == []
        again.sweep()
        assert not list(again.root.rglob("intent.json"))
    else:
        assert again.unfinished() in ([], [intent])
        again.clear_half_made()
        again.abandon(intent.dump_id)
        assert everything(shelf.root) == set()


def test_everything_is_on_disk_before_the_name(
    shelf: Shelf, begun: Any, checkpoint_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, intent = begun()
    events: list[str] = []
    original_sync, original_rename = module._sync, Path.rename

    def sync(path: Path) -> None:
        events.append(path.name)
        original_sync(path)

    def rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return original_rename(path, target)

    monkeypatch.setattr(module, "_sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    shelf.publish(intent.dump_id, checkpoint_of(intent))
    before, behind = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert {"pages-1.img", "images", "checkpoint.json", f".making-{intent.dump_id}"} <= set(before)
    assert "link" not in before  # what a symlink names is none of ours
    assert behind == [shelf.root.name]


def test_a_full_disk_shows_nothing(
    shelf: Shelf, begun: Any, checkpoint_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, intent = begun()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(OSError):
        shelf.publish(intent.dump_id, checkpoint_of(intent))
    assert shelf.all() == []
    shelf.abandon(intent.dump_id)
    assert everything(shelf.root) == set()


def test_a_full_disk_at_the_beginning_leaves_nothing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        shelf.begin(instance_id="i-1", app="a", build_id="b", now=1.0)
    assert everything(shelf.root) == set()


@pytest.mark.parametrize("torn", ["", "{", "[]", "null", '{"app": "a"}', '{"platform": 3}'])
def test_what_cannot_be_read_is_not_there(shelf: Shelf, begun: Any, checkpoint_of: Any, torn: str) -> None:
    _, intent = begun()
    checkpoint = checkpoint_of(intent)
    shelf.publish(intent.dump_id, checkpoint)
    (shelf.directory(checkpoint.checkpoint_id) / "checkpoint.json").write_text(torn)
    assert shelf.all() == []
    with pytest.raises(NotFound):
        shelf.load(checkpoint.checkpoint_id)
    making, other = begun()
    (making / "intent.json").write_text(torn)
    assert shelf.unfinished() == []
    shelf.clear_half_made()
    assert not shelf.making(other.dump_id).exists()


def test_one_that_is_still_written_to_goes(shelf: Shelf, begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a CRIU whose keeper was killed: a file comes between the look into a directory and its removal."""
    directory, intent = begun()
    remove, late = shutil.rmtree, [directory / "images" / "a", directory / "images" / "b"]

    def raced(path: Path, *, ignore_errors: bool) -> None:
        if late:
            late.pop().touch()
        else:
            remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", raced)
    shelf.abandon(intent.dump_id)
    assert not directory.exists()


def test_one_in_the_making_survives_the_clearing(shelf: Shelf, begun: Any) -> None:
    """Its keeper may be at it still, or have the result: the restarted node asks."""
    directory, intent = begun()
    shelf.clear_half_made()
    assert directory.exists()
    assert shelf.unfinished() == [intent]


def test_oldest_first(shelf: Shelf, begun: Any, checkpoint_of: Any) -> None:
    for now in (3.0, 1.0, 2.0):
        _, intent = begun(now=now)
        shelf.publish(intent.dump_id, checkpoint_of(intent))
    assert [checkpoint.created_at for checkpoint in shelf.of_build("b1")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "name",
    ["", "cp-", "x", "cp-/../../etc", "../cp-1", "cp-a/b", "cp-\0", "cp-a\n", ".making-1", "cp-" + "a" * 300],
)
def test_names_that_are_none_of_ours(shelf: Shelf, name: str) -> None:
    for call in (shelf.directory, shelf.load, shelf.remove):
        with pytest.raises(NotFound):
            call(name)


# --- health -------------------------------------------------------------------------------------------


@pytest.fixture
def published(shelf: Shelf, begun: Any, checkpoint_of: Any) -> str:
    _, intent = begun()
    checkpoint = checkpoint_of(intent)
    shelf.publish(intent.dump_id, checkpoint)
    return str(checkpoint.checkpoint_id)


def test_quarantine_at_the_second_failure(shelf: Shelf, published: str) -> None:
    assert shelf.health(published) == Health()
    assert shelf.restore_failed(published, "no memory", damaged=False) == Health(1, False, "no memory")
    assert shelf.restore_failed(published, "again", damaged=False) == Health(2, True, "again")
    assert Shelf(shelf.root).health(published).quarantined


def test_damage_is_quarantined_at_once(shelf: Shelf, published: str) -> None:
    assert shelf.restore_failed(published, "bad hash", damaged=True).quarantined


def test_a_success_in_between_forgives(shelf: Shelf, published: str) -> None:
    shelf.restore_failed(published, "once", damaged=False)
    shelf.restore_worked(published)
    assert not shelf.restore_failed(published, "once more", damaged=False).quarantined


@pytest.mark.parametrize("torn", ["", "[]", '{"failures": 1, "unknown": 2}'])
def test_a_lost_health_file_costs_a_retry_only(shelf: Shelf, published: str, torn: str) -> None:
    (shelf.directory(published) / "health.json").write_text(torn)
    assert shelf.health(published) == Health()
    assert shelf.restore_failed(published, "x", damaged=False).failures == 1


def test_a_failure_of_one_that_was_removed_meanwhile(shelf: Shelf, published: str) -> None:
    shelf.remove(published)
    shelf.restore_failed(published, "its images are gone", damaged=True)
    shelf.restore_worked(published)
    assert everything(shelf.root) == set()


# --- removing -----------------------------------------------------------------------------------------


def test_remove(shelf: Shelf, published: str) -> None:
    with (shelf.directory(published) / "images" / "pages-1.img").open("rb") as held:
        shelf.remove(published)
        assert held.read() == b"abc"
    assert everything(shelf.root) == set()
    with pytest.raises(NotFound):
        shelf.remove(published)


def test_a_removal_that_was_interrupted(
    shelf: Shelf, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone from the first moment, and its bytes at the next start."""
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        shelf.remove(published)
    assert shelf.all() == []
    assert everything(shelf.root) != set()
    Shelf(shelf.root).sweep()
    assert everything(shelf.root) == set()


def test_removing_again_what_came_back(shelf: Shelf, published: str) -> None:
    """Fetched again from the region after a removal that a crash interrupted."""
    grave = shelf.root / f".removing-{published}"
    (grave / "images").mkdir(parents=True)
    shelf.remove(published)
    assert everything(shelf.root) == set()


def test_size_is_what_it_takes_on_disk(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.write(b"x" * 8192)
    (tmp_path / "dangling").symlink_to("/nowhere")
    assert 8192 <= size_of(tmp_path) < 1 << 20


def test_the_record_is_readable_by_people(shelf: Shelf, published: str) -> None:
    content = json.loads((shelf.directory(published) / "checkpoint.json").read_text())
    assert content["platform"]["kernel"] == "6.12.0"


def test_what_the_region_cached_counts_as_here(
    shelf: Shelf, begun: Any, checkpoint_of: Any, tmp_path: Path
) -> None:
    _, intent = begun()
    checkpoint = checkpoint_of(intent)
    shelf.publish(intent.dump_id, checkpoint)
    elsewhere = tmp_path / "cached"
    shelf.directory(checkpoint.checkpoint_id).rename(elsewhere)
    assert shelf.all() == []
    shelf.link(checkpoint.checkpoint_id, elsewhere)
    assert shelf.all() == [checkpoint]
    assert shelf.restore_failed(checkpoint.checkpoint_id, "damaged", damaged=True).quarantined
    assert shelf.health(checkpoint.checkpoint_id).quarantined
    shutil.rmtree(elsewhere)  # evicted
    assert shelf.all() == []
    shelf.unlink(checkpoint.checkpoint_id)
    assert shelf.directory(checkpoint.checkpoint_id).parent == shelf.root
