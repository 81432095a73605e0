"""Debian's and Ubuntu's package sources: those of the host, and what they mean for another suite.

A host behind a mirror has the mirror in its sources; a base made here, and packages installed into any base of
the same distribution, come from there too. What stays in an image are the distribution's public addresses.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """A distribution (``debian`` or ``ubuntu``) and the code name of its suite."""

    distribution: str
    suite: str


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One ``deb`` line: an archive's address, suite and components."""

    uri: str
    suite: str
    components: tuple[str, ...]


_SUITES = {
    "debian": {
        "bullseye": "bullseye",
        "11": "bullseye",
        "bookworm": "bookworm",
        "12": "bookworm",
        "trixie": "trixie",
        "13": "trixie",
    },
    "ubuntu": {
        "jammy": "jammy",
        "22.04": "jammy",
        "noble": "noble",
        "24.04": "noble",
    },
}

PYTHONS: Mapping[str, str] = {
    "bullseye": "3.9",
    "bookworm": "3.11",
    "trixie": "3.13",
    "jammy": "3.10",
    "noble": "3.12",
}
"""The Python that each suite has."""

_KEYRINGS = {
    "debian": Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    "ubuntu": Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
}

KEYRING_PACKAGES: Mapping[str, str] = {"debian": "debian-archive-keyring", "ubuntu": "ubuntu-keyring"}

_NAME = re.compile(
    r"(?:(?:docker\.io|index\.docker\.io|registry-1\.docker\.io)/)?(?:library/)?(debian|ubuntu):([^@]+)"
)
_DATED = re.compile(r"-(slim|backports|\d{8}(\.\d+)?)")


def known(image: str) -> Release | None:
    """The release that an image name of a registry stands for, where its content is the distribution's own."""
    match = _NAME.fullmatch(image)
    if not match:
        return None
    tag = _DATED.sub("", match[2])
    suite = _SUITES[match[1]].get(tag)
    return Release(match[1], suite) if suite else None


def release_of(root: Path) -> Release | None:
    """The release that a root file system says it is (os-release(5)); None for other distributions."""
    for name in ("etc/os-release", "usr/lib/os-release"):
        path = root / name
        if path.is_file() and not path.is_symlink():
            fields = dict(_assignments(path.read_text(errors="replace")))
            distribution, suite = fields.get("ID", ""), fields.get("VERSION_CODENAME", "")
            return Release(distribution, suite) if distribution in _SUITES and suite else None
    return None


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            yield name.strip(), value.strip().strip("\"'")


def keyring(release: Release) -> Path | None:
    """The distribution's keys on this host, if their package is installed."""
    path = _KEYRINGS[release.distribution]
    return path if path.is_file() else None


def public_sources(release: Release) -> list[Source]:
    """The distribution's own archives."""
    suite = release.suite
    if release.distribution == "ubuntu":
        ports = platform.machine() != "x86_64"
        archive = "http://ports.ubuntu.com/ubuntu-ports" if ports else "http://archive.ubuntu.com/ubuntu"
        security = archive if ports else "http://security.ubuntu.com/ubuntu"
        parts: tuple[str, ...] = ("main", "universe")
    else:
        archive, security = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
        parts = ("main",)
    return [
        Source(archive, suite, parts),
        Source(archive, f"{suite}-updates", parts),
        Source(security, f"{suite}-security", parts),
    ]


def sources_for(release: Release, host_root: Path = Path("/")) -> list[Source]:
    """Where this host would get ``release`` from: its own archives, with another suite of the same
    distribution put in where needed; the public ones for another distribution."""
    host = release_of(host_root)
    if host is None or host.distribution != release.distribution:
        return public_sources(release)
    found = []
    for source in host_sources(host_root / "etc/apt"):
        suite = source.suite.rstrip("/")
        base, dash, rest = suite.partition("-")
        if base in (host.suite, "stable") and (dash, rest) in (("", ""), ("-", "updates"), ("-", "security")):
            found.append(Source(source.uri, release.suite + dash + rest, source.components))
    if not any(source.suite == release.suite for source in found):
        return public_sources(release)
    return list(dict.fromkeys(found))


def is_public(sources: list[Source], release: Release) -> bool:
    """Whether ``sources`` are archives of the distribution's own, which every base of it already names."""
    hosts = re.compile(
        r"https?://(deb|security|ftp\.[a-z]+|archive|ports|[a-z]+\.archive)\.(debian\.org|ubuntu\.com)/"
    )
    return all(hosts.match(source.uri) for source in sources)


def lines(sources: list[Source], signed_by: Path | None = None) -> list[str]:
    """As sources.list(5) lines."""
    option = f"[signed-by={signed_by}] " if signed_by else ""
    return [f"deb {option}{source.uri} {source.suite} {' '.join(source.components)}" for source in sources]


def host_sources(directory: Path) -> list[Source]:
    """The enabled binary sources below an ``/etc/apt``, in both of sources.list(5)'s styles."""
    parts = directory / "sources.list.d"
    listed = sorted(parts.iterdir()) if parts.is_dir() else []
    found: list[Source] = []
    for path in [directory / "sources.list", *listed]:
        if not path.is_file():
            continue
        text = path.read_text(errors="replace")
        if path.suffix == ".list":
            found += _one_line(text)
        elif path.suffix == ".sources":
            found += _deb822(text)
    return found


_ONE_LINE = re.compile(
    r"deb\s+(?:\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>(?:\s+[^\s#]+)*)"
)


def _one_line(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        if match := _ONE_LINE.match(line.strip()):
            yield Source(match["uri"], match["suite"], tuple(match["components"].split()))


def _deb822(text: str) -> Iterator[Source]:
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in (
            "no",
            "false",
        ):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, tuple(fields.get("components", "").split()))
