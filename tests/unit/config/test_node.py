"""node.toml: defaults, ranges, and where its files are."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.config import load_node
from relume.errors import ConfigError


def test_a_node_runs_without_a_file() -> None:
    config = load_node(None)
    assert config.file is None
    assert config.store.url is None
    assert config.key_file is None
    assert config.node.allow_userfaultfd is True
    assert config.node.listen is None


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text(
        """
[store]
url = "s3://bucket/prefix"
[region]
name = "eu"
key_file = "region.key"
prefetch = true
[node]
listen = "127.0.0.1:8080"
allow_userfaultfd = false
max_log_bytes = 100000
[node.limits]
max_instances = 3
"""
    )
    config = load_node(path)
    assert config.store.url == "s3://bucket/prefix"
    assert config.key_file == tmp_path / "region.key"
    assert config.region.prefetch
    assert config.node.listen == "127.0.0.1:8080"
    assert config.node.limits.max_instances == 3
    assert {warning.kind for warning in config.warnings} == {"not_acted"}


@pytest.mark.parametrize(
    "text",
    [
        '[store]\nurl = "http://example.org"',
        '[node]\nlisten = "here"',
        '[node]\nlisten = ":80"',
        '[node]\nlisten = "host:99999"',
        "[node]\nmax_log_bytes = 1",
        "[node.limits]\nmax_instances = 0",
        "[region]\nprefetch = 3",
        "store = 1",
    ],
)
def test_values_that_are_not_allowed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_node(path)
    assert caught.value.details["allowed"]


def test_unknown_keys_are_warnings(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[store]\nurI = "file:/x"\n')
    (warning,) = load_node(path).warnings
    assert "did you mean url?" in warning.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_node(tmp_path / "node.toml")
