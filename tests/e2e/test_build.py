"""Builds with real parts: mmdebstrap, apt, pip, runc, overlay. Needs root.

The base is kept between runs in ``$RELUME_TEST_CACHE`` (default /var/cache/relume/test-builds): it takes half a
minute, and everything here shares it. Each test has an app of its own name, so nothing else is shared.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relume.build import Build, Builder, Layer
from relume.build.sandbox import group_prefix
from relume.config import load_app
from relume.errors import BuildError
from relume.linux import cgroup, mounts

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="builds need root"),
    pytest.mark.timeout(300),
]

ROOT = Path(os.environ.get("RELUME_TEST_CACHE", "/var/cache/relume/test-builds"))

Write = Callable[..., Path]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Builder]:
    """A builder on the shared directory; the builds of a test are removed, and nothing else may be left."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "1.1"):
        _wheel(wheels, version)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    builder = Builder(ROOT)
    asyncio.run(builder.clean())
    before = {build.build_id for build in builder.builds()}
    yield builder
    for build in builder.builds():
        if build.build_id not in before:
            builder.remove(build.build_id)
    assert nothing_left()


def nothing_left() -> bool:
    """Whether no scratch file, mount or control group of a build is there."""
    prefix = group_prefix(ROOT / "tmp").lstrip("/")
    groups = [path for root in cgroup.hierarchies() for path in root.glob(f"{prefix}*")]
    assert (list((ROOT / "tmp").iterdir()), mounts.under(ROOT), groups) == ([], [], [])
    return True


def _wheel(directory: Path, version: str) -> None:
    """A wheel with a module and a console script, so that no test depends on an index."""
    info = f"relume_sample-{version}.dist-info"
    with zipfile.ZipFile(directory / f"relume_sample-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "relume_sample.py", f"VERSION = {version!r}\n\ndef main():\n    print('sample', VERSION)\n"
        )
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: relume-sample\nVersion: {version}\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\nsample = relume_sample:main\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def write(tmp_path: Path, request: pytest.FixtureRequest) -> Write:
    """Write an app: its toml after the name, and its files."""
    name = request.node.originalname.replace("_", "-")[:60].rstrip("-")

    def make(toml: str = "", at: str = "app", deployment: str = "", **files: str) -> Path:
        app = tmp_path / at
        app.mkdir(parents=True, exist_ok=True)
        head = f'[cerebrium.deployment]\nname = "{name}"\n{deployment}\n'
        if "[cerebrium.runtime.custom]" not in toml:
            head += '[cerebrium.runtime.custom]\nentrypoint = ["python", "main.py"]\n'
        (app / "cerebrium.toml").write_text(head + textwrap.dedent(toml))
        for path, text in {"main.py": "import sys\n", **files}.items():
            (app / path).parent.mkdir(parents=True, exist_ok=True)
            (app / path).write_text(text)
        return app

    return make


SAMPLE = '[cerebrium.dependencies.pip]\nrelume-sample = "1.0"\n'


async def build(builder: Builder, app: Path, lines: list[str] | None = None, *, fresh: bool = False) -> Build:
    take = lines.append if lines is not None else lambda line: None
    return await builder.build(app, load_app(app), fresh=fresh, progress=take)


def look(build: Build, script: str, tmp_path: Path) -> str:
    """What a shell script prints in the build's file system, in its environment and directory."""
    root, upper, work = (tmp_path / f"look-{name}" for name in ("root", "upper", "work"))
    for path in (root, upper, work):
        path.mkdir(exist_ok=True)
    mounts.overlay([layer.path for layer in build.layers], upper, work, root)
    try:
        command = ["chroot", str(root), "/bin/sh", "-ec", f"cd {build.cwd}; {script}"]
        done = subprocess.run(command, env=dict(build.env), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout
    finally:
        mounts.unmount_all(root)


async def test_dependencies_and_files(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write(
        SAMPLE,
        deployment='shell_commands = ["cat main.py > made.txt; rm gone.txt; rm -r old; mkdir old"]',
        **{
            "gone.txt": "x",
            "old/file": "x",
            "sub/tool.py": "A = 1\n",
            ".env": "SECRET=1",
            "sub/__pycache__/x.pyc": "stale",
        },
    )
    (app / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (app / "run.sh").chmod(0o755)
    lines: list[str] = []
    made = await build(builder, app, lines)

    assert (made.argv, made.cwd, made.user, made.port) == (("python", "main.py"), "/cortex", "0:0", 8000)
    assert made.resolved["pip"]["relume-sample"] == "1.0"
    assert made.resolved["python"].startswith("3.11.")
    out = look(made, "find . | sort; ./run.sh; sample; which python sample; cat made.txt", tmp_path)
    pyc = ["./__pycache__", "./__pycache__/main.cpython-311.pyc"]
    sub = ["./sub", "./sub/__pycache__", "./sub/__pycache__/tool.cpython-311.pyc", "./sub/tool.py"]
    files = [".", *pyc, "./made.txt", "./main.py", "./old", "./run.sh", *sub]
    assert out.splitlines() == [
        *files,
        *("ran", "sample 1.0", "/opt/venv/bin/python", "/opt/venv/bin/sample", "import sys"),
    ]
    # The byte code fits the files as they lie there: nothing is compiled again at run time.
    assert "wrote" not in look(made, "python -v -c 'import relume_sample, relume, main' 2>&1", tmp_path)
    assert builder.load(made.build_id) == made


async def test_nothing_of_the_host_is_in_the_layers(builder: Builder, write: Write, tmp_path: Path) -> None:
    made = await build(builder, write(SAMPLE, deployment='pre_build_commands = ["env > /srv/env"]'))
    seen = look(made, "cat /srv/env", tmp_path)
    assert f"PIP_FIND_LINKS={tmp_path}/wheels" in seen
    assert "PIP_NO_INDEX=1" in seen
    own = [layer for layer in made.layers if not (layer.path / "usr/bin").exists()]
    names = {str(path.relative_to(layer.path)) for layer in own for path in layer.path.rglob("*")}
    allowed = ("opt", "opt/venv", "opt/relume", "cortex", "srv", "srv/env")
    strange = {
        name
        for name in names
        if name not in allowed and not name.startswith(("opt/venv/", "opt/relume/", "cortex/"))
    }
    assert strange == set()
    assert not [name for name in made.env if name.startswith(("PIP_", "UV_", "SSL_", "APT_"))]
    for layer in made.layers:
        kept = {str(path.relative_to(layer.path)) for path in layer.path.glob("etc/*")}
        assert not kept & {"etc/resolv.conf", "etc/hostname", "etc/pip.conf", "etc/xdg"}


async def test_the_build_id(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write(SAMPLE)
    one = await build(builder, app)
    lines: list[str] = []
    other_place = write("# a comment\n" + SAMPLE + "[cerebrium.hardware]\nmemory = 3.0\n", at="deep/copy")
    os.utime(other_place / "main.py", (1, 1))
    same = await build(builder, other_place, lines)
    assert same.build_id == one.build_id
    assert any("reused" in line for line in lines)
    assert same.config["hardware"]["memory"] == 3.0

    (app / "main.py").write_text("import os\n")
    changed = await build(builder, app)
    assert changed.build_id != one.build_id
    assert changed.layers[:-1] == one.layers[:-1]  # only the app's own layer is new

    (app / "main.py").chmod(0o755)
    assert (await build(builder, app)).build_id not in (one.build_id, changed.build_id)

    write(SAMPLE + "[cerebrium.experimental]\ncheckpointing = true\n")
    assert (await build(builder, app)).checkpointing is True


@pytest.mark.slow  # everything is built twice
async def test_a_second_node_gets_the_same_layers(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write(SAMPLE)
    here = await build(builder, app)
    other = Builder(tmp_path / "other-node")
    base = here.layers[0]
    target = tmp_path / "other-node/layers" / base.digest
    await asyncio.to_thread(shutil.copytree, base.path, target, symlinks=True)
    index = next(ROOT.glob("index/base/*.json"), None)
    assert index is not None
    (tmp_path / "other-node/index/base").mkdir()
    for entry in ROOT.glob("index/base/*.json"):
        (tmp_path / "other-node/index/base" / entry.name).write_bytes(entry.read_bytes())
    there = await build(other, app)
    assert there.build_id == here.build_id
    assert [layer.digest for layer in there.layers] == [layer.digest for layer in here.layers]


async def test_functions_get_the_runner(
    builder: Builder, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    app = write("[cerebrium.runtime.custom]\nentrypoint = 'x'\n")
    toml = app / "cerebrium.toml"
    toml.write_text(toml.read_text().partition("[cerebrium.runtime.custom]")[0])
    made = await build(builder, app)
    assert made.argv[:3] == ("python3", "-m", "relume_runner")
    assert {"uvicorn", "starlette"} <= set(made.resolved["pip"])
    (app / "main.py").unlink()
    with pytest.raises(BuildError, match=r"no entrypoint and no main\.py"):
        await build(builder, app)


async def test_apt_packages_and_requirement_files(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write(
        """
        [cerebrium.dependencies.paths]
        pip = "requirements.txt"
        apt = "pkglist.txt"
        """,
        **{"requirements.txt": "-c limits.txt\nrelume-sample\n", "limits.txt": "relume-sample<1.1\n"},
        # The second is a virtual package, of what is there already: it can be installed, and not be listed.
        **{"pkglist.txt": "python3-six\nperlapi-5.36.0\n"},
    )
    made = await build(builder, app)
    assert made.resolved["pip"]["relume-sample"] == "1.0"
    assert list(made.resolved["apt"]) == ["python3-six"]
    # A package of apt's is importable beside pip's.
    assert look(made, "python -c 'import six, relume_sample; print(six.__file__)'", tmp_path).startswith(
        "/usr/lib/"
    )
    system = made.layers[1].path
    left = [
        system / name for name in ("var/lib/apt/lists", "var/cache/apt", "var/log/dpkg.log", "var/log/apt")
    ]
    assert not any(path.exists() for path in left)


async def test_a_local_package_and_uv(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write(
        '[cerebrium.dependencies.paths]\npip = "requirements.txt"\n',
        deployment="use_uv = true",
        **{"requirements.txt": "./wheels/relume_sample-1.1-py3-none-any.whl\n"},
    )
    (app / "wheels").mkdir()
    _wheel(app / "wheels", "1.1")
    made = await build(builder, app)
    assert look(made, "sample", tmp_path) == "sample 1.1\n"


async def test_a_failing_command(builder: Builder, write: Write) -> None:
    app = write(deployment='shell_commands = ["echo before; ls /nowhere; exit 7"]')
    with pytest.raises(BuildError) as caught:
        await build(builder, app)
    assert caught.value.details["status"] == 7
    assert "before" in caught.value.details["output"]  # of two streams, so in either order
    assert "No such file" in caught.value.message
    assert nothing_left()

    with pytest.raises(BuildError, match="relume-no-such-package") as caught:
        await build(builder, write('[cerebrium.dependencies.pip]\nrelume-no-such-package = "latest"\n'))
    assert any("No matching distribution" in line for line in caught.value.details["output"])
    assert nothing_left()

    with pytest.raises(BuildError, match="Unable to locate package"):
        await build(builder, write('[cerebrium.dependencies.apt]\nrelume-no-such-package = "latest"\n'))


async def test_a_python_that_cannot_be_had(
    builder: Builder, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mirror that answers nothing stands for a network that lets nothing through.
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", "http://127.0.0.1:1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(BuildError, match=r"no Python 3\.13: the base has 3\.11") as caught:
        await build(builder, write(deployment='python_version = "3.13"'))
    assert 'python_version = "3.11"' in caught.value.hint
    assert "trixie has 3.13" in caught.value.hint


async def test_an_app_that_needs_no_python(builder: Builder, write: Write) -> None:
    app = write(
        '[cerebrium.runtime.custom]\nentrypoint = ["sleep", "1"]\n', deployment='python_version = "3.13"'
    )
    lines: list[str] = []
    made = await build(builder, app, lines)
    assert "python" not in made.resolved
    assert any("asks for none" in line for line in lines)


async def test_cancelling_ends_the_commands(builder: Builder, write: Write) -> None:
    app = write(deployment='shell_commands = ["echo started; exec sleep 4711"]')
    started = asyncio.Event()

    def progress(line: str) -> None:
        if line.strip() == "started":
            started.set()

    task = asyncio.create_task(builder.build(app, load_app(app), progress=progress))
    await asyncio.wait_for(started.wait(), 120)
    async with asyncio.timeout(20):
        while not _running("4711"):  # noqa: ASYNC110  (it says so before it becomes the command)
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _running("4711")
    assert nothing_left()


def _running(argument: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", argument.encode()]:
            found.append(path.parent.name)
    return found


async def test_a_killed_builder_is_cleaned_up_after(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write(deployment='shell_commands = ["echo started; exec sleep 4712"]')
    program = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from relume.build import Builder
        from relume.config import load_app
        app = Path({str(app)!r})
        show = lambda line: print(line, flush=True)
        asyncio.run(Builder(Path({str(ROOT)!r})).build(app, load_app(app), progress=show))
    """)
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert any(line.strip() == "started" for line in child.stdout)
            async with asyncio.timeout(30):
                while not _running("4712"):  # noqa: ASYNC110  (it says so before it becomes the command)
                    await asyncio.sleep(0.01)
            await builder.clean()
            assert _running("4712"), "clean must leave the builds of living processes alone"
        finally:
            child.kill()
    await builder.clean()
    assert not _running("4712")
    assert nothing_left()


async def test_two_builds_of_the_same_work_once(builder: Builder, write: Write) -> None:
    app = write(deployment='shell_commands = ["echo worked"]')
    lines: list[str] = []
    one, other = await asyncio.gather(build(builder, app, lines), build(Builder(ROOT), app, lines))
    assert one == other
    assert sum(line.strip() == "worked" for line in lines) == 1
    assert sum("reused" in line for line in lines) == 1


async def test_removing_a_build_keeps_what_others_need(builder: Builder, write: Write) -> None:
    app = write(SAMPLE)
    one = await build(builder, app)
    (app / "main.py").write_text("import os\n")
    other = await build(builder, app)
    builder.remove(one.build_id)
    gone = [layer for layer in one.layers if layer not in other.layers]
    assert gone
    assert not any(layer.path.exists() for layer in gone)
    assert all(layer.path.is_dir() for layer in other.layers)
    lines: list[str] = []
    assert await build(builder, app, lines) == other
    assert lines == [f"build {other.build_id}: nothing changed, reused"]


@pytest.mark.slow
async def test_fresh_makes_everything_anew(builder: Builder, write: Write, tmp_path: Path) -> None:
    app = write('[cerebrium.dependencies.pip]\nrelume-sample = "<1.1"\n')
    one = await build(builder, app)
    _wheel(tmp_path / "wheels", "1.0.1")
    assert (await build(builder, app)).build_id == one.build_id
    fresh = await build(builder, app, fresh=True)
    assert fresh.resolved["pip"]["relume-sample"] == "1.0.1"
    assert fresh.layers[0] == one.layers[0]  # the same packages make the same base, byte for byte
    assert (await build(builder, app)).build_id == fresh.build_id
    again = await build(builder, app, fresh=True)
    assert again.build_id != fresh.build_id
    assert again.layers == fresh.layers


def test_layers_are_plain(builder: Builder) -> None:
    """What overlayfs notes for itself in an upper directory is not in any layer."""
    for path in (ROOT / "layers").iterdir():
        layer = Layer(path.name, path)
        assert not [name for name in os.listxattr(layer.path) if name.startswith("trusted.overlay.o")]
        assert layer.path.stat().st_uid == 0
