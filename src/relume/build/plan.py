"""What a build is made of, read from the app's configuration: every input, in the words of the tools.

A ``Plan`` is complete: two equal plans give the same build, and nothing else of the configuration (hardware,
scaling, probes) takes part. ``inputs`` is what ``build_id`` covers before any layer is made.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from relume.build.base import BaseName
from relume.build.files import AppFiles
from relume.build.model import Build
from relume.config import AppConfig
from relume.errors import BuildError

FORMAT = 1
"""Raised whenever the same inputs would give another build than before."""


@dataclasses.dataclass(frozen=True, slots=True)
class Requirements:
    """What pip installs. ``lines`` come from the table; ``files`` maps requirement files (the named one first,
    then those it includes) to their text. ``local`` says that they refer to files of the app."""

    lines: tuple[str, ...] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    local: bool = False

    def __bool__(self) -> bool:
        return bool(self.lines or self.files)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """All inputs of a build. ``base`` is None where ``dockerfile`` (a path in the app) makes it."""

    app: str
    files: AppFiles
    base: BaseName | None
    dockerfile: str | None
    python_version: str
    requirements: Requirements
    use_uv: bool
    apt: tuple[str, ...]
    pre_build_commands: tuple[str, ...]
    shell_commands: tuple[str, ...]
    entrypoint: tuple[str, ...] | None
    port: int
    checkpointing: bool
    guest: str
    """Digest of what relume itself adds to the build."""

    @property
    def needs_python(self) -> bool:
        """Whether the app could not do without an interpreter, as far as its configuration shows."""
        words = " ".join(self.entrypoint or ("python",))
        return (
            bool(self.requirements)
            or re.search(r"\b(python|pip|uvicorn|gunicorn|hypercorn)", words) is not None
        )

    def inputs(self) -> dict[str, Any]:
        """The inputs as JSON, without any place or time in them."""
        return {
            "format": FORMAT,
            "machine": platform.machine(),
            "app": self.app,
            "files": self.files.digest,
            "base": self.base.identity if self.base else None,
            "dockerfile": self.dockerfile,
            "python_version": self.python_version,
            "pip": list(self.requirements.lines),
            "pip_files": dict(self.requirements.files),
            "use_uv": self.use_uv,
            "apt": list(self.apt),
            "pre_build_commands": list(self.pre_build_commands),
            "shell_commands": list(self.shell_commands),
            "entrypoint": list(self.entrypoint) if self.entrypoint is not None else None,
            "port": self.port,
            "checkpointing": self.checkpointing,
            "guest": self.guest,
        }

    @property
    def inputs_digest(self) -> str:
        return key_of(self.inputs())


def key_of(value: Any) -> str:
    """64 hex digits over a JSON value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake3(canonical.encode()).hexdigest()


def build_id(inputs_digest: str, layers: Iterable[str], generation: int) -> str:
    """32 hex digits over the inputs and the layers they gave.

    ``generation`` tells builds apart that were asked for anew and came out the same; it is 0 for the first.
    """
    return key_of(["relume build", inputs_digest, list(layers), generation])[:32]


def plan(config: AppConfig, app_dir: Path, files: AppFiles, base: BaseName | None, guest: str) -> Plan:
    """Read the plan of an app. Raises BuildError for what no build can do."""
    deployment, dependencies = config.deployment, config.dependencies
    custom = config.runtime.custom
    if dependencies.conda or dependencies.paths.conda:
        raise BuildError(
            "conda dependencies cannot be installed: a build has no conda",
            hint="name the same packages in [cerebrium.dependencies.pip], or use a docker_base_image_url that "
            "has conda and install them in pre_build_commands",
        )
    return Plan(
        app=config.name,
        files=files,
        base=base,
        dockerfile=custom.dockerfile_path if custom else None,
        python_version=deployment.python_version,
        requirements=_requirements(app_dir, dependencies.pip, dependencies.paths.pip),
        use_uv=deployment.use_uv,
        apt=_apt_packages(app_dir, dependencies.apt, dependencies.paths.apt),
        pre_build_commands=tuple(deployment.pre_build_commands),
        shell_commands=tuple(deployment.shell_commands),
        entrypoint=tuple(custom.entrypoint) if custom and custom.entrypoint else None,
        port=custom.port if custom else 8000,
        checkpointing=config.checkpointing,
        guest=guest,
    )


def snapshot(config: AppConfig) -> dict[str, Any]:
    """The configuration as JSON, for ``Build.config``."""
    parts = ("deployment", "runtime", "hardware", "scaling", "dependencies", "experimental", "relume")
    return {name: getattr(config, name).model_dump(mode="json") for name in parts}


def with_config(build: Build, config: AppConfig) -> Build:
    """The same build with today's configuration: what is no input (memory, scaling) may have changed."""
    return dataclasses.replace(build, config=snapshot(config))


def with_runner(plan: Plan, argv: tuple[str, ...], requirements: tuple[str, ...]) -> Plan:
    """The plan of an app of functions: served by ``argv``, which needs ``requirements``."""
    more = dataclasses.replace(plan.requirements, lines=(*plan.requirements.lines, *requirements))
    return dataclasses.replace(plan, entrypoint=argv, requirements=more)


# --- pip ------------------------------------------------------------------------------------------

_ANY = frozenset({"", "*", "latest"})
_OPERATOR = re.compile(r"\s*(===|==|~=|!=|<=|>=|<|>)")
_URL = re.compile(r"(git|hg|svn|bzr)\+|https?://|file:")


def requirement(name: str, version: str) -> str:
    """One entry of a pip table as a requirement specifier."""
    name, version = name.strip(), version.strip()
    if _URL.match(version):
        return f"{name} @ {version}"
    if version in _ANY or _URL.match(name):
        return name
    if version.startswith("@"):
        return f"{name} {version}"
    return f"{name}{version}" if _OPERATOR.match(version) else f"{name}=={version}"


def _requirements(app_dir: Path, table: Mapping[str, str], named: str | None) -> Requirements:
    lines = tuple(requirement(name, version) for name, version in table.items())
    files = dict(_requirement_files(app_dir, named)) if named else {}
    local = any(map(_is_local, [*lines, *(line for text in files.values() for line in text.splitlines())]))
    return Requirements(lines, files, local)


_INCLUDE = re.compile(r"\s*(?:-r|--requirement|-c|--constraint)[\s=]*(?P<path>\S+)")
_LOCAL = re.compile(
    r"\s*(?:\.{0,2}/|\.(?:\s|\[|$)|-e\b|--editable\b|-f\b|--find-links\b|(?!\S*://)\S+\.(?:whl|zip|tar\.gz)\b)"
)


def _is_local(line: str) -> bool:
    return bool(_LOCAL.match(line)) or "file:" in line.partition("#")[0]


def _requirement_files(app_dir: Path, named: str) -> Iterable[tuple[str, str]]:
    """The named file and all that it includes, by their path in the app's directory."""
    seen: set[str] = set()
    pending = [named]
    while pending:
        path = pending.pop(0)
        if path in seen:
            continue
        seen.add(path)
        text = _read(app_dir, path, "pip")
        yield path, text
        for line in text.splitlines():
            match = _INCLUDE.match(line)
            if match and "://" not in match["path"]:
                pending.append(str(Path(path).parent / match["path"]))


def _read(app_dir: Path, path: str, kind: str) -> str:
    place = app_dir / path
    if not place.resolve().is_relative_to(app_dir.resolve()):
        raise BuildError(f"{path}: a {kind} requirement file must lie in the app's directory")
    try:
        return place.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BuildError(
            f"{path}: cannot be read: {error.strerror}", hint=f"see [cerebrium.dependencies.paths] {kind}"
        ) from error
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not UTF-8 text") from error


# --- apt ------------------------------------------------------------------------------------------

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]*(:[a-z0-9]+)?")
_VERSION = re.compile(r"[A-Za-z0-9.+:~-]+")


def _apt_packages(app_dir: Path, table: Mapping[str, str], named: str | None) -> tuple[str, ...]:
    packages = [apt_package(name, version) for name, version in table.items()]
    if named:
        for number, line in enumerate(_read(app_dir, named, "apt").splitlines(), 1):
            for word in line.partition("#")[0].split():
                name, _, version = word.partition("=")
                try:
                    packages.append(apt_package(name, version))
                except BuildError as error:
                    raise BuildError(f"{named}:{number}: {error.message}", hint=error.hint) from None
    return tuple(dict.fromkeys(packages))


def apt_package(name: str, version: str) -> str:
    """One entry of an apt table as apt-get takes it. Raises BuildError for ranges, which apt has none of."""
    name, version = name.strip(), version.strip().lstrip("=").strip()
    if not _PACKAGE.fullmatch(name):
        raise BuildError(f"{name!r} is not the name of a Debian package")
    if version in _ANY:
        return name
    if not _VERSION.fullmatch(version):
        raise BuildError(
            f"apt cannot install {name} {version!r}",
            hint='a Debian package has "latest" or one exact version',
        )
    return f"{name}={version}"
