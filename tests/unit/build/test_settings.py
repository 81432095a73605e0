"""The host's package-client settings: what is taken along into a build, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.build import settings
from relume.build.settings import SUPPORT, gather


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host whose system-wide files lie below ``tmp_path``."""
    root = tmp_path / "host"
    for name in (
        "etc",
        "home/.config/pip",
        "home/.config/uv",
        "mirror/simple/idna",
        "mirror/files",
        "wheels",
        "uv-wheels",
    ):
        (root / name).mkdir(parents=True)
    (root / "ca.crt").write_text("certificates")
    (root / "etc/constraints.txt").write_text("torch<3\n")
    (root / "etc/pip.conf").write_text(
        f"[global]\ncert = {root}/ca.crt\nconstraint = {root}/etc/constraints.txt\n"
    )
    (root / "home/.config/pip/pip.conf").write_text(
        f"[global]\nextra-index-url =\n  file://{root}/mirror/simple\n  https://example.org/simple\n"
        f"[install]\nfind-links = {root}/wheels {root}/missing\n"
    )
    (root / "home/.config/uv/uv.toml").write_text(
        f'find-links = ["{root}/uv-wheels"]\ncache-dir = "{root}/etc"\n'
    )
    monkeypatch.setattr(settings, "_PIP_FILES", (f"{root}/etc/pip.conf", "~/.config/pip/pip.conf"))
    monkeypatch.setattr(settings, "_UV_FILES", ("~/.config/uv/uv.toml",))
    monkeypatch.setattr(settings, "_AUTHORITIES", (root / "ca.crt",))
    monkeypatch.setattr(settings, "_APT_CREDENTIALS", (root / "auth.conf", root / "auth.conf.d"))
    monkeypatch.setattr(settings, "apt_options", lambda: ['Acquire::http::Proxy "http://proxy:3128";'])
    return root


def destinations(made: settings.Settings) -> dict[str, str]:
    return {mount.destination: mount.source for mount in made.mounts}


def test_configuration_files_and_what_they_name(host: Path) -> None:
    made = gather({}, host / "home")
    assert destinations(made) == {
        f"{SUPPORT}/ca.crt": f"{host}/ca.crt",
        "/root/.config/pip/pip.conf": f"{host}/home/.config/pip/pip.conf",
        "/root/.config/uv/uv.toml": f"{host}/home/.config/uv/uv.toml",
        f"{host}/etc/pip.conf": f"{host}/etc/pip.conf",
        f"{host}/etc/constraints.txt": f"{host}/etc/constraints.txt",
        f"{host}/mirror": f"{host}/mirror",  # the index links to files beside it
        f"{host}/wheels": f"{host}/wheels",
        f"{host}/uv-wheels": f"{host}/uv-wheels",
    }
    assert all("ro" in mount.options for mount in made.mounts)


def test_variables(host: Path) -> None:
    environ = {
        "PIP_INDEX_URL": "https://user:secret@mirror/simple",
        "PIP_FIND_LINKS": f"file://{host}/wheels",
        "PIP_TARGET": "/somewhere",
        "PIP_CACHE_DIR": "/home/me/.cache/pip",
        "UV_INDEX": f"mine=file://{host}/mirror/simple",
        "UV_PYTHON": "3.9",
        "UV_PYTHON_INSTALL_MIRROR": "https://mirror/python",
        "UV_PYTHON_INSTALL_DIR": "/somewhere",
        "https_proxy": "http://proxy:3128",
        "NO_PROXY": "localhost",
        "SSL_CERT_FILE": f"{host}/ca.crt",
        "SSL_CERT_DIR": "/etc/ssl/certs",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HOME": "/home/me",
    }
    made = gather(environ, host / "home")
    inside = f"{SUPPORT}/ca.crt"
    assert made.env == {
        "PIP_INDEX_URL": "https://user:secret@mirror/simple",
        "PIP_FIND_LINKS": f"file://{host}/wheels",
        "UV_INDEX": f"mine=file://{host}/mirror/simple",
        "UV_PYTHON_INSTALL_MIRROR": "https://mirror/python",
        "https_proxy": "http://proxy:3128",
        "NO_PROXY": "localhost",
        **dict.fromkeys(
            "AWS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO NODE_EXTRA_CA_CERTS PIP_CERT REQUESTS_CA_BUNDLE "
            "SSL_CERT_FILE".split(),
            inside,
        ),
    }


def test_apt(host: Path) -> None:
    text = gather({}, host / "home").apt
    assert 'Acquire::http::Proxy "http://proxy:3128";' in text
    assert f'Acquire::https::CaInfo "{SUPPORT}/ca.crt";' in text
    assert "/var/" not in text
    assert "netrc" not in text


def test_apts_credentials(host: Path) -> None:
    (host / "auth.conf.d").mkdir()
    assert "netrc" not in gather({}, host / "home").apt
    (host / "auth.conf.d/mirror.conf").write_text("machine mirror login me password secret\n")
    made = gather({}, host / "home")
    assert f'Dir::Etc::netrcparts "{SUPPORT}/auth.conf.d";' in made.apt
    assert "secret" not in made.apt
    assert destinations(made)[f"{SUPPORT}/auth.conf.d"] == f"{host}/auth.conf.d"


def test_a_broken_configuration_is_left_to_its_tool(host: Path) -> None:
    (host / "etc/pip.conf").write_text("no section = here")
    (host / "home/.config/uv/uv.toml").write_text("[[[")
    assert f"{host}/etc/pip.conf" in destinations(gather({}, host / "home"))


@pytest.mark.parametrize(
    "named", ["/", "/etc", "/usr", "file:///", "/proc", "relative/path", "/etc/../root", "/dev/null"]
)
def test_directories_that_are_never_mounted(host: Path, named: str) -> None:
    without = destinations(gather({}, host / "home"))
    assert destinations(gather({"PIP_FIND_LINKS": named}, host / "home")) == without


def test_a_host_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PIP_FILES", "_UV_FILES", "_AUTHORITIES", "_APT_CREDENTIALS"):
        monkeypatch.setattr(settings, name, ())
    monkeypatch.setattr(settings, "apt_options", list)
    made = gather({}, tmp_path)
    assert (made.env, made.mounts, made.authorities) == ({}, (), None)
