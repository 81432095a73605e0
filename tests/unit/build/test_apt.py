"""The host's package sources, and what they mean for another suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.build import apt
from relume.build.apt import Release, Source

DEB822 = """\
# mirror of ours
Types: deb deb-src
URIs: https://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Enabled: no
Types: deb
URIs: https://gone.example
Suites: bookworm
Components: main

Types: deb-src
URIs: https://sources.example
Suites: bookworm
Components: main
"""
ONE_LINE = """\
# deb http://old.example bookworm main
deb [arch=amd64 signed-by=/usr/share/x.gpg] https://mirror.example/security bookworm-security main # secure
deb-src http://sources.example bookworm main
deb https://deb.nodesource.com/node_20.x nodistro main
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    parts = tmp_path / "etc/apt/sources.list.d"
    parts.mkdir(parents=True)
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    (parts / "debian.sources").write_text(DEB822)
    (parts / "more.list").write_text(ONE_LINE)
    (parts / "other.list.disabled").write_text("deb http://disabled.example bookworm main\n")
    return tmp_path


def test_both_styles_are_read(host: Path) -> None:
    assert apt.host_sources(host / "etc/apt") == [
        Source("https://mirror.example/debian", "bookworm", ("main", "contrib")),
        Source("https://mirror.example/debian", "bookworm-updates", ("main", "contrib")),
        Source("https://mirror.example/security", "bookworm-security", ("main",)),
        Source("https://deb.nodesource.com/node_20.x", "nodistro", ("main",)),
    ]


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_the_hosts_mirror_serves_other_suites_too(host: Path, suite: str) -> None:
    sources = apt.sources_for(Release("debian", suite), host)
    assert apt.lines(sources) == [
        f"deb https://mirror.example/debian {suite} main contrib",
        f"deb https://mirror.example/debian {suite}-updates main contrib",
        f"deb https://mirror.example/security {suite}-security main",
    ]
    assert not apt.is_public(sources, Release("debian", suite))


def test_another_distribution_comes_from_its_own_archive(host: Path) -> None:
    noble = Release("ubuntu", "noble")
    sources = apt.sources_for(noble, host)
    assert sources == apt.public_sources(noble)
    assert apt.is_public(sources, noble)


def test_a_host_without_sources(tmp_path: Path) -> None:
    bookworm = Release("debian", "bookworm")
    assert apt.sources_for(bookworm, tmp_path) == apt.public_sources(bookworm)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("debian:bookworm-slim", Release("debian", "bookworm")),
        ("docker.io/library/debian:12", Release("debian", "bookworm")),
        ("debian:trixie-20260101-slim", Release("debian", "trixie")),
        ("ubuntu:24.04", Release("ubuntu", "noble")),
        ("library/ubuntu:jammy", Release("ubuntu", "jammy")),
        ("debian", None),
        ("debian:bokworm", None),
        ("ghcr.io/me/debian:bookworm", None),
        ("python:3.11-slim", None),
        ("debian:bookworm@sha256:0123", None),
    ],
)
def test_names_that_stand_for_a_distribution(image: str, expected: Release | None) -> None:
    assert apt.known(image) == expected


def test_signed_by_goes_into_the_line() -> None:
    line = apt.lines([Source("http://a", "s", ("main",))], Path("/k.gpg"))
    assert line == ["deb [signed-by=/k.gpg] http://a s main"]
