"""Dumps written to memory first: the same checkpoint, on the disk, and no mount of it left, whatever happens."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness import App, Relume, get, in_its_dump, shrink_to_fit, until
from relume.checkpoint import staging
from relume.linux import mounts

PROGRAM = """
import hashlib
ballast = bytearray(os.urandom(1 << 20) * 300)
ACTIONS["sum"] = lambda _: hashlib.sha256(ballast).hexdigest()
ACTIONS["answers"] = lambda _: answers
answers = []
def ask():
    request = urllib.request.Request("http://169.254.169.253:8234/checkpoint", method="POST")
    try:
        answers.append(json.loads(urllib.request.urlopen(request, timeout=600).read()))
    except http.client.RemoteDisconnected:
        answers.append("restored")
import http.client, urllib.request
threading.Thread(target=ask).start()
serve()
"""


@pytest.fixture
def in_memory(second: Relume, workplace: Path) -> Relume:
    """A node whose dumps always go to memory first."""
    config = workplace / f"{second.state.name}.toml"
    config.write_text('[node]\ndumps_in_memory = "always"\n')
    second.config = config
    second.start_node()
    return second


def restored_sum(relume: Relume, app: App) -> str:
    copy = relume.start(app.name)
    assert copy["restored"], copy
    until(lambda: get(copy, "/answers") == ["restored"])
    return str(get(copy, "/sum"))


def test_a_dump_in_memory_ends_on_the_disk(in_memory: Relume, app: App) -> None:
    app.write(PROGRAM)
    in_memory.deploy(app.directory)
    original = in_memory.start(app.name)
    (answer,) = until(lambda: get(original, "/answers"))
    assert answer["status"] == "created", answer
    assert not mounts.under(in_memory.state)
    facts = in_memory.json("checkpoints", "inspect", answer["checkpoint_id"])
    assert facts["timings"]["landing_s"] > 0
    assert restored_sum(in_memory, app) == get(original, "/sum")


def test_the_node_is_killed_over_a_dump_in_memory(in_memory: Relume, app: App) -> None:
    app.write(PROGRAM)
    in_memory.deploy(app.directory)
    original = in_memory.start(app.name)
    until(lambda: mounts.under(in_memory.state) or get(original, "/answers"))
    in_memory.kill_node(signal.SIGKILL)
    in_memory.start_node()
    (answer,) = until(lambda: get(original, "/answers"))
    assert answer["status"] == "created", answer
    assert not mounts.under(in_memory.state)
    assert restored_sum(in_memory, app) == get(original, "/sum")


def test_an_app_that_dies_in_its_dump_gives_the_memory_back(in_memory: Relume, app: App) -> None:
    app.write(PROGRAM)
    in_memory.deploy(app.directory)
    in_memory.start(app.name)
    until(lambda: mounts.under(in_memory.state) or in_memory.checkpoints(app.name))
    in_memory.stop(app.name)
    until(lambda: not mounts.under(in_memory.state))


def test_lands_whole_also_when_cut_short(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    staging.stage(images, 1 << 20)
    assert mounts.under(images)
    (images / "pages-1.img").write_bytes(b"page" * 1024)
    # An earlier run was killed in the middle of its copy.
    (tmp_path / "images.copying").mkdir()
    (tmp_path / "images.copying" / "pages-1.img").write_bytes(b"pa")
    assert staging.land(images) is True
    assert not mounts.under(images)
    assert (images / "pages-1.img").read_bytes() == b"page" * 1024
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert staging.land(images) is False


def test_lands_what_was_copied_before_the_kill(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    staging.stage(images, 1 << 20)
    whole = tmp_path / "images.whole"
    whole.mkdir()
    (whole / "pages-1.img").write_bytes(b"page")
    assert staging.land(images) is True
    assert (images / "pages-1.img").read_bytes() == b"page"
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_disk_is_full_when_a_dump_is_to_land(in_memory: Relume, app: App) -> None:
    """There was room at the first look. The app runs on, the memory is given back, and the next request works."""
    app.write(PROGRAM.replace("threading.Thread(target=ask).start()", "ACTIONS['go'] = lambda _: ask()"))
    checkpoints = in_memory.state / "checkpoints"
    mounts.mount("tmpfs", checkpoints, "tmpfs", 0, "size=700m")
    try:
        in_memory.deploy(app.directory)
        original = in_memory.start(app.name)
        before = get(original, "/sum")
        with ThreadPoolExecutor() as pool:
            staged = lambda: len(mounts.under(checkpoints)) > 1  # noqa: E731
            asked = in_its_dump(in_memory, app, pool, original, "/go", staged)
            shrink_to_fit(checkpoints)
            asked.result()
        answer = get(original, "/answers")[-1]
        assert (answer["status"], answer["reason"]) == ("failed", "insufficient_disk"), answer
        assert mounts.under(checkpoints) == [checkpoints]
        assert list(checkpoints.iterdir()) == []
        mounts.mount("tmpfs", checkpoints, "tmpfs", mounts.MS_REMOUNT, "size=700m")
        get(original, "/go")
        assert get(original, "/answers")[-1]["status"] == "created"
        assert get(original, "/sum") == before
    finally:
        in_memory.stop(app.name)
        in_memory.kill_node(signal.SIGTERM)
        mounts.unmount(checkpoints)
