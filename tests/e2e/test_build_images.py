"""Builds on images that lie on this machine, and from Dockerfiles: skopeo, umoci and buildah for real. Needs root.

The images are a few files each, without a shell: nothing of a build may depend on one where none is needed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from relume.build import Build, Builder
from relume.build.sandbox import group_prefix
from relume.config import load_app
from relume.errors import BuildError
from relume.linux import cgroup, mounts

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="builds need root"),
    pytest.mark.timeout(300),
]

NAME = '[cerebrium.deployment]\nname = "images"\n'


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    root = tmp_path / "builds"
    yield Builder(root)
    prefix = group_prefix(root / "tmp").lstrip("/")
    groups = [path for hierarchy in cgroup.hierarchies() for path in hierarchy.glob(f"{prefix}*")]
    assert (list((root / "tmp").iterdir()), mounts.under(root), groups) == ([], [], [])


def run(*argv: str | Path) -> None:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout whose image ``base`` has two layers: the second deletes a file of the first."""
    root, bundle = tmp_path / "layout", tmp_path / "bundle"
    run("umoci", "init", "--layout", root)
    run("umoci", "new", "--image", f"{root}:base")
    run("umoci", "unpack", "--image", f"{root}:base", bundle)
    rootfs = bundle / "rootfs"
    (rootfs / "etc").mkdir()
    (rootfs / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\n")
    (rootfs / "gone").write_text("x")
    (rootfs / "bin").mkdir()
    (rootfs / "bin/serve").write_text("#!/no/shell\n")
    (rootfs / "bin/serve").chmod(0o4755)
    run("umoci", "repack", "--refresh-bundle", "--image", f"{root}:base", bundle)
    (rootfs / "gone").unlink()
    os.chown(rootfs / "bin/serve", 7, 8)
    (rootfs / "bin/serve").chmod(0o755)
    run("umoci", "repack", "--image", f"{root}:base", bundle)
    run(
        *(
            "umoci",
            "config",
            "--image",
            f"{root}:base",
            "--config.user",
            "web",
            "--config.env",
            "FROM_IMAGE=yes",
        ),
        *("--config.entrypoint", "/bin/serve", "--config.cmd", "--now", "--config.workingdir", "/srv"),
    )
    return root


def app_of(tmp_path: Path, toml: str, **files: str) -> Path:
    app = tmp_path / "app"
    app.mkdir(exist_ok=True)
    (app / "cerebrium.toml").write_text(NAME + toml)
    for name, text in {"main.txt": "hello", **files}.items():
        (app / name).write_text(text)
    return app


async def build(builder: Builder, app: Path) -> Build:
    return await builder.build(app, load_app(app), progress=lambda line: None)


def on(base: str) -> str:
    return f'docker_base_image_url = "{base}"\n[cerebrium.runtime.custom]\nentrypoint = ["/bin/serve"]\n'


async def test_a_layout(builder: Builder, layout: Path, tmp_path: Path) -> None:
    made = await build(builder, app_of(tmp_path, on(f"oci:{layout}:base")))
    base, app = made.layers[0].path, made.layers[-1].path
    assert (made.user, made.env["FROM_IMAGE"], made.env["HOME"], made.cwd) == (
        "33:44",
        "yes",
        "/srv",
        "/cortex",
    )
    assert made.argv == ("/bin/serve",)
    assert not (base / "gone").exists()
    status = (base / "bin/serve").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (7, 8, 0o755)
    assert (app / "cortex/main.txt").read_text() == "hello"
    assert "python" not in made.resolved


async def test_a_docker_archive_is_the_same_base(builder: Builder, layout: Path, tmp_path: Path) -> None:
    archive = tmp_path / "app/saved.tar"
    app_of(tmp_path, on(f"oci:{layout}:base"))
    one = await build(builder, tmp_path / "app")
    run("skopeo", "copy", "--quiet", f"oci:{layout}:base", f"docker-archive:{archive}:images:base")
    other = await build(
        builder, app_of(tmp_path, 'exclude = ["*.tar", ".*"]\n' + on("docker-archive:saved.tar"))
    )
    assert other.layers == one.layers
    assert other.build_id != one.build_id


async def test_the_same_layout_elsewhere_is_the_same_build(
    builder: Builder, layout: Path, tmp_path: Path
) -> None:
    one = await build(builder, app_of(tmp_path, on(f"oci:{layout}:base")))
    moved = layout.rename(tmp_path / "moved")
    assert (await build(builder, app_of(tmp_path, on(f"oci:{moved}:base")))).build_id == one.build_id


async def test_a_damaged_image(builder: Builder, layout: Path, tmp_path: Path) -> None:
    blobs = sorted((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blobs[-1].write_bytes(blobs[-1].read_bytes()[:-1] + b"x")
    with pytest.raises(BuildError, match="fetching the base"):
        await build(builder, app_of(tmp_path, on(f"oci:{layout}:base")))
    assert builder.builds() == []


async def test_a_name_that_no_registry_answers_for(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be had") as caught:
        await build(builder, app_of(tmp_path, on("127.0.0.1:1/nobody/nothing:latest")))
    assert "oci:PATH" in caught.value.hint


async def test_python_where_there_is_none(builder: Builder, layout: Path, tmp_path: Path) -> None:
    toml = on(f"oci:{layout}:base") + '[cerebrium.dependencies.pip]\nidna = "latest"\n'
    with pytest.raises(BuildError, match=r"no Python 3\.11: the base has none"):
        await build(builder, app_of(tmp_path, toml))


DOCKERFILE = '[cerebrium.runtime.custom]\ndockerfile_path = "Dockerfile"\nport = 9000\n'


async def test_a_dockerfile_from_nothing(builder: Builder, tmp_path: Path) -> None:
    text = (
        'FROM scratch\nCOPY main.txt /data/\nENV A=b\nWORKDIR /data\nENTRYPOINT ["/serve"]\nCMD ["--now"]\n'
    )
    app = app_of(tmp_path, DOCKERFILE, Dockerfile=text)
    made = await build(builder, app)
    assert (made.argv, made.cwd, made.port, made.user) == (("/serve", "--now"), "/data", 9000, "0:0")
    assert made.env["A"] == "b"
    assert made.env["PYTHONPATH"] == "/opt/relume/guest"
    image, sdk = made.layers
    assert sorted(path.name for path in image.path.rglob("*")) == ["data", "main.txt"]
    assert (sdk.path / "opt/relume/guest/relume/__init__.py").is_file()
    (app / "main.txt").write_text("other")
    assert (await build(builder, app)).build_id != made.build_id


async def test_a_dockerfile_from_a_layout(builder: Builder, layout: Path, tmp_path: Path) -> None:
    text = f"FROM oci:{layout}:base\nCOPY main.txt /srv/\n"
    made = await build(builder, app_of(tmp_path, DOCKERFILE, Dockerfile=text))
    assert (made.user, made.argv, made.cwd) == ("33:44", ("/bin/serve", "--now"), "/srv")
    assert (made.layers[0].path / "srv/main.txt").read_text() == "hello"


async def test_a_dockerfile_without_a_command(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no command to run"):
        await build(builder, app_of(tmp_path, DOCKERFILE, Dockerfile="FROM scratch\nCOPY main.txt /\n"))


async def test_dockerfiles_that_fail(builder: Builder, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="building Dockerfile failed") as caught:
        await build(builder, app_of(tmp_path, DOCKERFILE, Dockerfile="FROM scratch\nCOPY nothing /\n"))
    assert any("nothing" in line for line in caught.value.details["output"])
    (tmp_path / "app/Dockerfile").unlink()
    with pytest.raises(BuildError, match="Dockerfile: cannot be read"):
        await build(builder, app_of(tmp_path, DOCKERFILE))


@pytest.mark.slow
async def test_a_dockerfile_from_a_distribution_sees_the_hosts_settings(tmp_path: Path) -> None:
    """FROM debian works without a registry; RUN has the settings of the host, the image has none of them."""
    builder = Builder(Path(os.environ.get("RELUME_TEST_CACHE", "/var/cache/relume/test-builds")))
    text = (
        'FROM debian:bookworm-slim\nRUN env > /srv/env; apt-get update && echo ok > /srv/ok\nCMD ["true"]\n'
    )
    made = await build(builder, app_of(tmp_path, DOCKERFILE, Dockerfile=text))
    try:
        image = made.layers[0].path
        assert "APT_CONFIG=/run/relume-build/apt.conf" in (image / "srv/env").read_text()
        assert (image / "srv/ok").read_text() == "ok\n"
        assert "APT_CONFIG" not in made.env
        for name in (
            "run/relume-build",
            "etc/pip.conf",
            "etc/resolv.conf",
            "root/.config",
            "var/lib/apt/lists/lock",
        ):
            assert not (image / name).exists(), name
    finally:
        builder.remove(made.build_id)


async def test_cancelling_buildah(builder: Builder, tmp_path: Path) -> None:
    """Cancelled while buildah copies a large context; the fixture checks that nothing is left."""
    app = app_of(tmp_path, DOCKERFILE, Dockerfile="FROM scratch\nCOPY . /\n")
    with (app / "large").open("wb") as file:
        file.truncate(1 << 30)
    copying = asyncio.Event()

    def progress(line: str) -> None:
        if "COPY" in line:
            copying.set()

    task = asyncio.create_task(builder.build(app, load_app(app), progress=progress))
    await asyncio.wait_for(copying.wait(), 120)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert builder.builds() == []
