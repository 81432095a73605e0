"""The Python step: an interpreter of the wanted version, a virtual environment, the app's packages.

Everything goes into ``/opt/venv``, first on PATH, so that ``python`` and console scripts such as ``uvicorn`` are
found, and Debian's rule that pip must not write into the system's Python (PEP 668) is kept. The environment
sees the base's own packages (``--system-site-packages``): what an image or apt brought (``python3-gi``, a
vendor's PyTorch) is importable, as it would be without us.

Byte code is compiled here once, after the files got their final times, because layers are read-only: an
import at run time would compile into each instance's own writable layer again and again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from uv import find_uv_bin

from relume.build import apt, settle
from relume.build.interrupt import in_thread
from relume.build.plan import Plan, Requirements
from relume.build.sandbox import SUPPORT, Sandbox, read_only, writable
from relume.errors import BuildError, EngineError
from relume.runc import Mount

VENV = "/opt/venv"
MANAGED = "/opt/python"
"""Where uv puts an interpreter that the base does not have."""

_TABLE = ".table.txt"

_PROBE = """
for name in python{v} python3 python; do
    path=$(command -v "$name") || continue
    "$path" -c 'import sys
try:
    import ensurepip, venv
    able = "venv"
except ImportError:
    able = "bare"
print(sys.executable, "%d.%d" % sys.version_info[:2], able, sep="\\t")' || continue
done
command -v apt-get || true
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What the base has: interpreters as (path, "3.11", can make environments), and whether it has apt."""

    interpreters: tuple[tuple[str, str, bool], ...]
    has_apt: bool


Environment = Mapping[str, str]


async def probe(box: Sandbox, version: str, env: Environment) -> Found:
    """Look for interpreters in the base. A base without a shell has none."""
    try:
        answer = await box.run(
            ["/bin/sh", "-c", _PROBE.replace("{v}", version)],
            what="looking for Python in the base",
            env=env,
            show=_silent,
        )
    except (BuildError, EngineError):  # no /bin/sh: runc does not even start it
        return Found((), False)
    lines = [line.split("\t") for line in answer.splitlines()]
    found = tuple((fields[0], fields[1], fields[2] == "venv") for fields in lines if len(fields) == 3)
    return Found(found, any(fields[0].endswith("apt-get") for fields in lines))


def _silent(_line: str) -> None:
    pass


async def install(
    box: Sandbox, plan: Plan, env: Environment, binds: list[Mount], app: Path | None
) -> dict[str, object]:
    """Make the environment and install ``plan.requirements``; returns the versions installed.

    ``app`` is a copy of the app's files for requirements that refer to them. Raises BuildError.
    """
    interpreter = await _interpreter(box, plan, env, binds)
    if interpreter is None:
        box.progress(f"python: the base has no Python {plan.python_version}, and the app asks for none")
        return {}
    await box.run(
        [interpreter, "-m", "venv", "--system-site-packages", VENV],
        what=f"making a virtual environment with {interpreter}",
        env=env,
    )
    inside = {**env, "PATH": f"{VENV}/bin:{env['PATH']}", "VIRTUAL_ENV": VENV}
    if plan.requirements:
        await _install_packages(box, plan, inside, binds, app)
    await in_thread(lambda check: settle.set_times(box.merged / VENV.lstrip("/"), check=check))
    await compile_bytecode(box, inside, f"{VENV}/lib")
    return {"python": await _version(box, inside), "pip": await _installed(box, inside)}


async def compile_bytecode(box: Sandbox, env: Environment, directory: str) -> None:
    """Compile what is below ``directory``; files that are no valid Python (templates, tests) are passed over."""
    script = f'exec "$0" -m compileall -q -j 0 --invalidation-mode timestamp {directory} || true'
    await box.run(
        ["/bin/sh", "-c", f"({script}) >/dev/null 2>&1 || true", f"{VENV}/bin/python"],
        what="compiling Python files",
        env={**env, "PYTHONHASHSEED": "0"},  # the order of a compiled set depends on it
    )


async def _interpreter(box: Sandbox, plan: Plan, env: Environment, binds: list[Mount]) -> str | None:
    version = plan.python_version
    found = await probe(box, version, env)
    fitting = [(path, able) for path, has, able in found.interpreters if has == version]
    if fitting and fitting[0][1]:
        box.progress(f"python: {fitting[0][0]} ({version}), the base's own")
        return fitting[0][0]
    if not plan.needs_python:
        return None
    if found.has_apt and await _apt_has(box, env, binds, f"python{version}-venv"):
        box.progress(f"python: {version}, from the base's apt sources")
        script = f"apt-get install -y --no-install-recommends python{version} python{version}-venv"
        await box.run(["/bin/sh", "-c", script], what=f"installing Python {version}", env=env, binds=binds)
        return f"/usr/bin/python{version}"
    return await _managed(box, version, found, env, binds)


async def _apt_has(box: Sandbox, env: Environment, binds: list[Mount], package: str) -> bool:
    script = f'apt-get update -q && [ -n "$(apt-cache madison {package})" ]'
    try:
        await box.run(["/bin/sh", "-c", script], what="asking apt for Python", env=env, binds=binds)
    except BuildError:
        return False
    return True


async def _managed(box: Sandbox, version: str, found: Found, env: Environment, binds: list[Mount]) -> str:
    box.progress(f"python: {version} is not in the base; asking uv for one")
    command = [f"{SUPPORT}/uv", "python"]
    env = {**env, "UV_PYTHON_INSTALL_DIR": MANAGED}
    try:
        await box.run(
            [*command, "install", "--no-bin", version],
            what=f"installing Python {version} by uv",
            env=env,
            binds=[*binds, uv_mount()],
        )
        path = await box.run(
            [*command, "find", "--managed-python", version],
            what=f"finding uv's Python {version}",
            env=env,
            binds=[*binds, uv_mount()],
        )
        return path.strip()
    except BuildError as error:
        raise BuildError(
            f"no Python {version}: the base has {_versions(found)}, and uv could not get one",
            hint=_what_would_work(found),
            **error.details,
        ) from error


def _versions(found: Found) -> str:
    return " and ".join(dict.fromkeys(version for _, version, _ in found.interpreters)) or "none"


def _what_would_work(found: Found) -> str:
    own = [f'python_version = "{version}"' for _, version, _ in found.interpreters[:1]]
    bases = ", ".join(f"{suite} has {version}" for suite, version in apt.PYTHONS.items())
    return " or ".join([*own, f"a docker_base_image_url that has it ({bases})"])


def uv_mount() -> Mount:
    """Our own uv, for use inside."""
    return read_only(Path(find_uv_bin()), f"{SUPPORT}/uv")


async def _install_packages(
    box: Sandbox, plan: Plan, env: Environment, binds: list[Mount], app: Path | None
) -> None:
    directory = box.directory / "requirements"
    arguments = _write_requirements(plan.requirements, directory)
    binds = [*binds, read_only(directory, f"{SUPPORT}/requirements"), uv_mount()]
    if app is not None:
        binds.append(writable(app, "/cortex"))
    tool = "uv" if plan.use_uv else "pip"
    box.progress(
        f"{tool}: installing {len(plan.requirements.lines)} requirements{_and_files(plan.requirements)}"
    )
    if plan.use_uv:
        command = [f"{SUPPORT}/uv", "pip", "install", "--python", f"{VENV}/bin/python", "--no-progress"]
    else:
        command = [
            f"{VENV}/bin/python",
            "-m",
            "pip",
            "install",
            "--no-input",
            "--no-compile",
            "--progress-bar=off",
        ]
    await box.run(
        [*command, *arguments],
        what=f"installing Python packages by {tool}",
        env=env,
        cwd="/cortex" if app is not None else "/",
        binds=binds,
    )


def _and_files(requirements: Requirements) -> str:
    return f" and {next(iter(requirements.files))}" if requirements.files else ""


def _write_requirements(requirements: Requirements, directory: Path) -> list[str]:
    directory.mkdir()
    arguments = []
    if requirements.lines:
        (directory / _TABLE).write_text("".join(f"{line}\n" for line in requirements.lines))
        arguments += ["-r", f"{SUPPORT}/requirements/{_TABLE}"]
    for path, text in requirements.files.items():
        place = directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    if requirements.files:
        arguments += ["-r", f"{SUPPORT}/requirements/{next(iter(requirements.files))}"]
    return arguments


async def _version(box: Sandbox, env: Environment) -> str:
    code = "import platform; print(platform.python_version())"
    show: Callable[[str], None] = _silent
    return (
        await box.run(
            [f"{VENV}/bin/python", "-c", code], what="asking Python for its version", env=env, show=show
        )
    ).strip()


async def _installed(box: Sandbox, env: Environment) -> dict[str, str]:
    command = [
        f"{VENV}/bin/python",
        "-m",
        "pip",
        "list",
        "--local",
        "--format=json",
        "--disable-pip-version-check",
    ]
    answer = await box.run(command, what="listing installed packages", env=env, show=_silent)
    return {entry["name"]: entry["version"] for entry in json.loads(answer)}
