"""The host's package-client settings, for use inside a build container.

A machine behind a mirror, a proxy or an authority of its own has that written down for its package clients. A
build uses the same: pip's and uv's configuration files and the directories they name, apt's options, sources
and credentials, the authorities the host trusts, and the PIP_*, UV_* and proxy variables. All of it is mounted
read-only or given in the environment of build commands; none of it becomes part of a layer or of the
environment of instances.

Variables that say *where* to install (PIP_TARGET, UV_PROJECT_ENVIRONMENT and their like) are left out: that is the
build's to say.
"""

from __future__ import annotations

import configparser
import dataclasses
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from relume.build.sandbox import SUPPORT, read_only
from relume.runc import Mount

_AUTHORITIES = (
    Path("/etc/ssl/certs/ca-certificates.crt"),
    Path("/etc/pki/tls/certs/ca-bundle.crt"),
)
_AUTHORITY_VARIABLES = (
    "AWS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
)
_PROXY = re.compile(r"(?i)(https?|ftp|all|no)_proxy")
_CLIENT = re.compile(r"(PIP|UV)_[A-Z0-9_]+")
_NOT_INHERITED = re.compile(
    r"PIP_(TARGET|PREFIX|ROOT|USER|SRC|PYTHON|REQUIRE_VIRTUALENV|CACHE_DIR|LOG|REPORT|REQUIREMENT|EDITABLE|DRY_RUN|"
    r"CONFIG_FILE|CERT|COMPILE|NO_COMPILE|PROGRESS_BAR)"
    r"|UV_(CACHE_DIR|COMPILE_BYTECODE|CONFIG_FILE|ENV_FILE|NO_CACHE|PROJECT.*|PYTHON|PYTHON_(INSTALL|BIN|CACHE)_DIR|"
    r"SYSTEM_PYTHON|TARGET|PREFIX|TOOL_.*|WORKING_DIRECTORY|LINK_MODE)"
)

_PIP_FILES = ("/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
_UV_FILES = ("/etc/uv/uv.toml", "~/.config/uv/uv.toml")
_HOME_INSIDE = "/root"

_NEVER_MOUNTED = frozenset(
    Path(path)
    for path in "/ /bin /boot /dev /etc /home /lib /lib64 /media /mnt /opt /proc /root /run /sbin /srv /sys /tmp "
    "/usr /var".split()
)

_APT_CREDENTIALS = (Path("/etc/apt/auth.conf"), Path("/etc/apt/auth.conf.d"))

_APT_SECTIONS = re.compile(r"(Acquire::(?!IndexTargets)|APT::Authentication)")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What build commands get: variables and mounts. ``apt`` is the text of an apt.conf."""

    env: Mapping[str, str]
    mounts: tuple[Mount, ...]
    apt: str
    authorities: Path | None
    """The host's bundle of trusted authorities, at ``SUPPORT/ca.crt`` inside."""


def gather(environ: Mapping[str, str], home: Path) -> Settings:
    """Read the settings of this host, for the user whose home is ``home``."""
    authorities = _authorities(environ)
    env = {name: value for name, value in environ.items() if _inherited(name)}
    mounts: dict[str, Mount] = {}
    if authorities:
        inside = f"{SUPPORT}/ca.crt"
        mounts[inside] = read_only(authorities, inside)
        env |= dict.fromkeys(_AUTHORITY_VARIABLES, inside)
    values = [value for name, value in env.items() if _CLIENT.fullmatch(name)]
    pip_files = [*_PIP_FILES, *((named,) if (named := environ.get("PIP_CONFIG_FILE")) else ())]
    for written in [*pip_files, *_UV_FILES]:
        if (path := _expand(written, home)).is_file():
            place = _inside(written)
            mounts[place] = read_only(path, place)
            values += _toml_values(path) if path.suffix == ".toml" else _pip_values(path)
    if named := environ.get("PIP_CONFIG_FILE"):
        env["PIP_CONFIG_FILE"] = _inside(named)
    options = apt_options()
    values += [option.partition('"')[2].rstrip('";') for option in options]
    for value in values:
        for path in _local_paths(value):
            mounts.setdefault(str(path), read_only(path))
    for path in _APT_CREDENTIALS:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            inside = f"{SUPPORT}/{path.name}"
            mounts[inside] = read_only(path, inside)
            options.append(f'Dir::Etc::{"netrc" if path.is_file() else "netrcparts"} "{inside}";')
    return Settings(env, _outermost(mounts), _apt(options, authorities), authorities)


def _inherited(name: str) -> bool:
    return bool(_PROXY.fullmatch(name) or (_CLIENT.fullmatch(name) and not _NOT_INHERITED.fullmatch(name)))


def _authorities(environ: Mapping[str, str]) -> Path | None:
    named = [Path(environ[name]) for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE") if environ.get(name)]
    return next((path for path in (*named, *_AUTHORITIES) if path.is_file()), None)


def _expand(written: str, home: Path) -> Path:
    return home / written.removeprefix("~/") if written.startswith("~/") else Path(written)


def _inside(written: str) -> str:
    return f"{_HOME_INSIDE}/{written.removeprefix('~/')}" if written.startswith("~/") else written


def _pip_values(path: Path) -> Iterator[str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError):
        return  # pip inside says what is wrong with it
    for section in parser.sections():
        for name, value in parser.items(section):
            if name not in ("cert", "cache-dir", "log"):
                yield value


def _toml_values(path: Path) -> Iterator[str]:
    try:
        data: Any = tomllib.loads(path.read_text())
    except ValueError:
        return
    pending = [data]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending.extend(inner for name, inner in value.items() if name != "cache-dir")
        elif isinstance(value, list):
            pending.extend(value)


def _local_paths(value: str) -> Iterator[Path]:
    """The host's files and directories that a setting names: plain absolute paths and file URLs."""
    for word in value.replace(",", " ").split():
        word = word.partition("=")[2] if word.count("=") == 1 and "=file:" in word else word  # uv's NAME=URL
        path = Path(unquote(urlsplit(word).path)) if word.startswith("file:") else Path(word)
        if not path.is_absolute() or ".." in path.parts or not (path.is_file() or path.is_dir()):
            continue
        # A simple index (PEP 503) commonly lies in DIR/simple and links to files elsewhere in DIR.
        if word.startswith("file:") and path.name == "simple" and path.parent not in _NEVER_MOUNTED:
            path = path.parent
        if path not in _NEVER_MOUNTED:
            yield path


def _outermost(mounts: Mapping[str, Mount]) -> tuple[Mount, ...]:
    """Without binds of a path onto itself below another such; parents first, so that none hides another."""
    kept: list[Mount] = []
    for destination in sorted(mounts):
        mount = mounts[destination]
        covered = any(
            parent.source == parent.destination
            and mount.source == mount.destination
            and destination.startswith(parent.destination + "/")
            for parent in kept
        )
        if not covered:
            kept.append(mount)
    return tuple(kept)


def _apt(options: list[str], authorities: Path | None) -> str:
    """An apt.conf(5) with the host's download options, for ``APT_CONFIG`` inside."""
    lines = [
        # Lists and packages go to scratch, and are fetched by root: apt's own user may not enter there.
        f'Dir::State::lists "{SUPPORT}/apt/lists";',
        f'Dir::Cache "{SUPPORT}/apt/cache";',
        'Dir::Cache::pkgcache "";',
        'Dir::Cache::srcpkgcache "";',
        'APT::Sandbox::User "root";',
        'APT::Keep-Downloaded-Packages "false";',
        'Dpkg::Use-Pty "false";',
        'Acquire::Retries "3";',
    ]
    if authorities:
        lines.append(f'Acquire::https::CaInfo "{SUPPORT}/ca.crt";')
    return "\n".join([*lines, *options]) + "\n"


def apt_options() -> list[str]:
    """The host's own options on how to download, as apt.conf(5) lines; none where there is no apt."""
    try:
        dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [line for line in dump.splitlines() if _APT_SECTIONS.match(line) and not line.endswith('"";')]
