"""The place of builds: publishing, finding again, locking, and letting go."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from relume.build.depot import Depot, Made
from relume.build.model import Build, Layer
from relume.errors import BuildError


def content(workspace: Path, text: str) -> Path:
    made = workspace / f"made-{text}"
    made.mkdir()
    (made / "file").write_text(text)
    return made


def build_of(name: str, *layers: Layer, app: str = "app", inputs: str = "inputs") -> Build:
    return Build(
        build_id=name,
        app=app,
        inputs_digest=inputs,
        layers=layers,
        argv=("run", "it"),
        env={"A": "b"},
        cwd="/cortex",
        user="0:0",
        port=8000,
        checkpointing=True,
        config={"hardware": {"memory": 2.0}},
        base="base",
        resolved={"pip": {"idna": "3.7"}},
        created_at=1.5,
    )


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(tmp_path / "builds")


async def publish(depot: Depot, text: str) -> Layer:
    with depot.workspace() as workspace:
        return await depot.publish(content(workspace, text))


async def test_the_same_content_is_one_layer(depot: Depot) -> None:
    one, again, other = [await publish(depot, text) for text in ("a", "a", "b")]
    assert one == again != other
    assert (one.path / "file").read_text() == "a"
    assert list(depot.tmp.iterdir()) == []


async def test_a_stage_is_found_again_until_its_layer_goes(depot: Depot) -> None:
    made = Made(await publish(depot, "a"), {"python": "3.11"})
    assert depot.lookup("python", "key") is None
    depot.record("python", "key", made)
    assert depot.lookup("python", "key") == made
    depot.sweep()
    assert depot.lookup("python", "key") is None
    assert not made.layer.path.exists()
    with pytest.raises(BuildError, match="gone"):
        depot.layer(made.layer.digest)


async def test_builds_survive_a_new_depot_and_share_layers(depot: Depot) -> None:
    shared, own = await publish(depot, "shared"), await publish(depot, "own")
    one, other = build_of("one", shared, own), build_of("two", shared, inputs="others")
    for build in (one, other):
        depot.save(build)
    again = Depot(depot.root)
    assert again.load("one") == one
    assert again.newest("others") == other
    assert {build.build_id for build in again.builds()} == {"one", "two"}
    again.forget(one)
    assert again.sweep() == [own.digest]
    assert again.load("two") == other
    assert again.newest("inputs") is None


async def test_a_base_is_kept_for_the_next_build(depot: Depot) -> None:
    layer = await publish(depot, "base")
    depot.record("base", "key", Made(layer, {}))
    assert depot.sweep() == []


async def test_a_build_without_one_of_its_layers_is_none(depot: Depot) -> None:
    layer = await publish(depot, "a")
    depot.save(build_of("one", layer))
    (layer.path / "file").unlink()
    layer.path.rmdir()
    assert depot.load("one") is None
    assert depot.newest("inputs") is None
    assert depot.builds() == []


async def test_files_that_are_no_builds(depot: Depot) -> None:
    (depot.root / "builds/bad.json").write_text("{")
    (depot.root / "builds/list.json").write_text("[]")
    (depot.root / "builds/short.json").write_text("{}")
    assert [depot.load(name) for name in ("bad", "list", "short", "none", "../builds/bad")] == [None] * 5


async def test_the_newest_build_of_the_same_inputs_wins(depot: Depot) -> None:
    layer = await publish(depot, "a")
    older, newer = build_of("one", layer), build_of("two", layer)
    depot.save(older)
    depot.save(dataclasses.replace(newer, created_at=2.5))
    assert depot.newest("inputs") == dataclasses.replace(newer, created_at=2.5)
    depot.forget(older)
    assert depot.newest("inputs") is not None


async def test_a_lock_excludes_another_builder_and_lets_go(depot: Depot) -> None:
    other, order = Depot(depot.root), []

    async def hold(which: Depot, name: str) -> None:
        async with which.lock("thing"):
            order.append(f"{name} in")
            await asyncio.sleep(0.15)
            order.append(f"{name} out")

    await asyncio.gather(hold(depot, "one"), hold(other, "other"))
    assert order in (
        ["one in", "one out", "other in", "other out"],
        ["other in", "other out", "one in", "one out"],
    )


async def test_waiting_for_a_lock_can_be_cancelled(depot: Depot) -> None:
    async with depot.lock("thing"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), Depot(depot.root).lock("thing"):
                pass
    async with asyncio.timeout(5), depot.lock("thing"):
        pass


async def test_nothing_is_swept_while_a_build_is_in_the_making(depot: Depot) -> None:
    layer = await publish(depot, "a")
    async with depot.lock("builds", shared=True):
        assert depot.sweep() == []
        assert layer.path.is_dir()
    assert depot.sweep() == [layer.digest]


def test_a_workspace_is_abandoned_only_when_its_builder_is_gone(depot: Depot) -> None:
    with depot.workspace() as alive:
        (depot.tmp / "left").mkdir()
        assert depot.abandoned() == [depot.tmp / "left"]
        depot.drop(depot.tmp / "left")
        assert alive.is_dir()
    assert list(depot.tmp.iterdir()) == []
    assert not list((depot.root / "locks").glob("workspace-*"))


async def test_interrupted_publishing_leaves_no_layer(depot: Depot) -> None:
    with depot.workspace() as workspace:
        made = content(workspace, "a")
        (made / "large").write_bytes(bytes(64 << 20))
        task = asyncio.create_task(depot.publish(made))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert list(depot.tmp.iterdir()) == []


def test_a_build_survives_json(tmp_path: Path) -> None:
    build = build_of("one", Layer("a" * 64, tmp_path / ("a" * 64)))
    assert Build.from_dict(build.as_dict(), tmp_path) == build
    with pytest.raises(KeyError):
        Build.from_dict({}, tmp_path)
