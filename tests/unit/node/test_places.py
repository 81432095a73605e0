"""Where a node keeps things, and what it reads out of a build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from relume.build.plan import snapshot
from relume.config import load_app
from relume.node.places import Places
from relume.node.settings import Settings


def test_everything_of_a_node_carries_its_id() -> None:
    one, two = (Places(Path("/state") / node, node).instance("i-1") for node in ("n1", "n2"))
    for attribute in ("runtime", "kept", "cgroup", "rootfs", "bundle", "images", "criu_work", "upper", "log"):
        assert getattr(one, attribute) != getattr(two, attribute)
        assert "n1" in str(getattr(one, attribute))


def test_paths_of_sockets_fit_into_a_socket_address() -> None:
    """sun_path has 107 bytes (unix(7)), however long the path of the state directory is."""
    places = Places(Path("/" + "long/" * 60), "0123abcd").instance("i-0123456789ab")
    for path in (places.runtime / "keeper.sock", places.criu_work / "lazy-pages.socket"):
        assert len(str(path)) <= 107


def test_the_log_outlives_the_runtime_directory() -> None:
    places = Places(Path("/state"), "n1").instance("i-1")
    assert not places.log.is_relative_to(places.runtime)
    assert not places.exit_file.is_relative_to(places.runtime)
    assert places.rootfs.is_relative_to(places.runtime)


def settings_of(directory: Path, toml: str) -> Settings:
    """Through the real configuration and the form in which a build keeps it."""
    (directory / "cerebrium.toml").write_text(toml)
    return Settings.of(SimpleNamespace(config=snapshot(load_app(directory))))  # type: ignore[arg-type]


def test_settings_of_a_build_that_says_nothing(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, '[cerebrium.deployment]\nname = "a"\n')
    assert settings.limits.cpus == 2.0 and settings.limits.memory == 4 << 30
    assert (settings.readycheck, settings.trigger, settings.filesystem) == ("", "request", "held")
    assert (settings.prepared, settings.held_limit) == (0, 10**9)
    assert settings.boot_timeout > 0


def test_settings_of_a_build_that_says_all(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        """
        [cerebrium.deployment]
        name = "a"
        deployment_initialization_timeout = 99
        [cerebrium.hardware]
        cpu = 1.5
        memory = 0.5
        [cerebrium.runtime.custom]
        entrypoint = ["serve"]
        port = 80
        readycheck_endpoint = "/ready"
        [relume.checkpoint]
        trigger = "ready"
        filesystem = "all"
        loopback = "close"
        fill = "demand"
        prepared = 2
        """,
    )
    assert (settings.limits.cpus, settings.limits.memory) == (1.5, 1 << 29)
    assert (settings.readycheck, settings.boot_timeout) == ("/ready", 99.0)
    assert (settings.trigger, settings.filesystem, settings.loopback, settings.fill) == (
        "ready",
        "all",
        "close",
        "demand",
    )
    assert settings.prepared == 2
