"""What is wrong is refused, and the error names file, line, key, value and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relume.config import load_app
from relume.errors import ConfigError

HEAD = '[cerebrium.deployment]\nname = "app"\n'


def refused(directory: Path, text: str | bytes, **options: object) -> ConfigError:
    raw = text if isinstance(text, bytes) else text.encode()
    (directory / "cerebrium.toml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load_app(directory, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return caught.value


def test_a_value_out_of_range(tmp_path: Path) -> None:
    error = refused(tmp_path, f"{HEAD}\n[cerebrium.hardware]\nmemory = -4\n")
    assert error.message == (
        f"{tmp_path}/cerebrium.toml:5: cerebrium.hardware.memory = -4: must be a number above 0, at most 65536"
    )
    assert error.details["line"] == 5
    assert error.details["key"] == "cerebrium.hardware.memory"
    assert error.details["value"] == "-4"
    assert error.details["allowed"] == "a number above 0, at most 65536"


@pytest.mark.parametrize(
    ("table", "line", "key"),
    [
        ("deployment", 'python_version = "2.7"', "python_version"),
        ("deployment", "python_version = 3.1", "python_version"),
        ("deployment", "deployment_initialization_timeout = 59", "deployment_initialization_timeout"),
        ("deployment", "deployment_initialization_timeout = 831", "deployment_initialization_timeout"),
        ("deployment", "disable_auth = 1", "disable_auth"),
        ("deployment", "include = [1]", "include"),
        ("deployment", "shell_commands = 3", "shell_commands"),
        ("deployment", 'docker_base_image_url = ""', "docker_base_image_url"),
        ("runtime", 'container_runtime = "v3"', "container_runtime"),
        ("runtime", "custom = 1", "custom"),
        ("runtime.custom", "port = 80", "entrypoint"),
        ("runtime.custom", 'entrypoint = "a"\nport = 0', "port"),
        ("runtime.custom", 'entrypoint = "a"\nport = 65536', "port"),
        ("runtime.custom", "entrypoint = []", "entrypoint"),
        ("runtime.custom", 'entrypoint = "a \'b"', "entrypoint"),
        ("runtime.custom", 'entrypoint = ["a\\u0000"]', "entrypoint"),
        ("runtime.custom", 'entrypoint = "a"\nreadycheck_endpoint = "/a\\r\\nX: y"', "readycheck_endpoint"),
        ("runtime.custom", 'dockerfile_path = "../Dockerfile"', "dockerfile_path"),
        ("runtime.custom", 'dockerfile_path = "/etc/passwd"', "dockerfile_path"),
        ("hardware", "cpu = 0", "cpu"),
        ("hardware", "cpu = nan", "cpu"),
        ("hardware", "memory = inf", "memory"),
        ("hardware", 'memory = "a lot"', "memory"),
        ("hardware", "cpu = true", "cpu"),
        ("hardware", 'compute = "AMPERE_A11"', "compute"),
        ("hardware", 'compute = ["CPU", "ADA_L4"]', "compute"),
        ("hardware", "compute = []", "compute"),
        ("hardware", "compute = 7", "compute"),
        ("hardware", "gpu_count = -1", "gpu_count"),
        ("hardware", "gpu_count = 1.5", "gpu_count"),
        ("hardware", 'provider = "mine"', "provider"),
        ("scaling", "min_replicas = -1", "min_replicas"),
        ("scaling", "cooldown = 3601", "cooldown"),
        ("scaling", "response_grace_period = 15", "response_grace_period"),
        ("scaling", "evaluation_interval_seconds = 5", "evaluation_interval_seconds"),
        ("scaling", "roll_out_duration_seconds = 21601", "roll_out_duration_seconds"),
        ("scaling", 'scaling_metric = "load"', "scaling_metric"),
        ("scaling", 'scaling_metric = "cpu_utilization"', "scaling_metric"),
        (
            "scaling",
            'scaling_metric = "memory_utilization"\nmin_replicas = 1\nscaling_buffer = 1',
            "scaling_buffer",
        ),
        ("scaling", 'load_balancing_algorithm = "best"', "load_balancing_algorithm"),
        ("dependencies", 'pip = ["numpy"]', "pip"),
        ("dependencies.pip", "numpy = true", "numpy"),
        ("dependencies.pip", '"--index-url" = "latest"', "--index-url"),
        ("dependencies.pip", 'numpy = "1\\n--index-url x"', "numpy"),
        ("dependencies.apt", 'curl = { version = "1" }', "curl"),
        ("dependencies.paths", 'pip = "../requirements.txt"', "pip"),
        ("experimental", 'checkpointing = "yes please"', "checkpointing"),
    ],
)
def test_values_that_are_not_allowed(tmp_path: Path, table: str, line: str, key: str) -> None:
    text = f"{HEAD}{line}\n" if table == "deployment" else f"{HEAD}[cerebrium.{table}]\n{line}\n"
    error = refused(tmp_path, text)
    assert error.details["key"] == f"cerebrium.{table}.{key}"
    assert error.details["line"] is not None
    assert error.details["allowed"]
    assert str(tmp_path / "cerebrium.toml") in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize(
    "key", ['trigger = "now"', 'filesystem = "none"', "prepared = 65", "prepared_max_age_s = 0", 'fill = ""']
)
def test_our_own_table_has_ranges_too(tmp_path: Path, key: str) -> None:
    error = refused(tmp_path, f"{HEAD}[relume.checkpoint]\n{key}\n")
    assert error.details["key"] == f"relume.checkpoint.{key.split()[0]}"


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "..", ".", "", "-a", "a-", "a b", "a.b", "é", "a\\n", "x" * 64, "a\\u0000b", "$(id)"],
)
def test_names_that_cannot_be_directories_and_host_names(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, f'[cerebrium.deployment]\nname = "{name}"\n')
    assert error.details["key"] == "cerebrium.deployment.name"
    assert error.details["line"] == 2


@pytest.mark.parametrize("name", ["a", "A1", "1-faster-whisper", "my_app", "x" * 63])
def test_names_that_can(tmp_path: Path, name: str) -> None:
    (tmp_path / "cerebrium.toml").write_text(f'[cerebrium.deployment]\nname = "{name}"\n')
    assert load_app(tmp_path).name == name


def test_another_name_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "cerebrium.toml").write_text(HEAD)
    assert load_app(tmp_path, name="other").name == "other"
    with pytest.raises(ConfigError, match="not a name"):
        load_app(tmp_path, name="../other")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    error = refused(tmp_path, f'{HEAD}[cerebrium.hardware]\ncpu = -1\nmemory = -1\nprovider = "x"\n')
    assert [problem["line"] for problem in error.details["problems"]] == [4, 5, 6]
    assert len(error.message.splitlines()) == 3


@pytest.mark.parametrize("text", ["", "a = 1", "cerebrium = 1", "[cerebrium.hardware]\ncpu = 1\n"])
def test_no_deployment_table(tmp_path: Path, text: str) -> None:
    error = refused(tmp_path, text)
    assert error.details["key"] == "cerebrium.deployment"
    assert "name" in error.hint


def test_a_missing_name(tmp_path: Path) -> None:
    error = refused(tmp_path, "[cerebrium.deployment]\nuse_uv = true\n")
    assert "cerebrium.deployment.name: is missing" in error.message


def test_unknown_keys_are_warnings_and_under_strict_errors(tmp_path: Path) -> None:
    text = f"{HEAD}pyhton_version = 3\nport = 80\n[cerebrium.hardwear]\n[cerebium]\n"
    (tmp_path / "cerebrium.toml").write_text(text)
    messages = {warning.key: (warning.kind, warning.message) for warning in load_app(tmp_path).warnings}
    assert messages == {
        "cerebrium.deployment.pyhton_version": (
            "unknown",
            "unknown key, ignored; did you mean python_version?",
        ),
        "cerebrium.deployment.port": (
            "unknown",
            "unknown key, ignored; it belongs in [cerebrium.runtime.custom]",
        ),
        "cerebrium.hardwear": ("unknown", "unknown key, ignored; did you mean hardware?"),
        "cerebium": ("unknown", "unknown key, ignored; did you mean cerebrium?"),
    }
    error = refused(tmp_path, text, strict=True)
    assert len(error.details["problems"]) == 4
    assert "ignored" not in error.message
    assert error.details["allowed"].startswith("one of name, python_version")


def test_a_table_that_is_only_there_in_the_header_of_another_has_its_line(tmp_path: Path) -> None:
    entry = '[cerebrium.runtime.custom]\nentrypoint = "a"\n'
    error = refused(tmp_path, f"{HEAD}{entry}[cerebrium.zebra.stripes]\ncount = 9\n", strict=True)
    assert error.details["line"] == 5
    assert error.message.startswith(f"{tmp_path}/cerebrium.toml:5: cerebrium.zebra: unknown key")


def test_thousands_of_unknown_keys_are_told_in_few_lines(tmp_path: Path) -> None:
    (tmp_path / "cerebrium.toml").write_text(HEAD + "".join(f"k{i} = 1\n" for i in range(5000)))
    warnings = load_app(tmp_path).warnings
    assert len(warnings) == 51
    assert "4950 more" in " ".join(warning.message for warning in warnings)


def test_line_ends_of_windows_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "cerebrium.toml").write_bytes(
        b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode() + b"x = 1\r\n"
    )
    config = load_app(tmp_path)
    assert config.name == "app"
    assert config.warnings[0].line == 3


def test_a_file_of_10_mb(tmp_path: Path) -> None:
    error = refused(tmp_path, b"#" * 10_000_000)
    assert "larger than 256 KiB" in error.message
    assert "256 KiB" in error.hint


def test_broken_utf8_names_its_line(tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD.encode() + b'exclude = ["caf\xe9"]\n')
    assert error.details["line"] == 3
    assert "UTF-8" in error.message


def test_broken_toml_names_its_line(tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + "use_uv = yes\n")
    assert error.details["line"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 50_000,
        "a = " + "9" * 5000,
        "a." * 60_000 + "a = 1",
        "a = 1979-99-99",
        "a = 1\na = 2",
        "\x00",
    ],
    ids=["nested", "digits", "dotted", "date", "twice", "nul"],
)
def test_what_breaks_parsers_is_an_error_here(tmp_path: Path, text: str) -> None:
    refused(tmp_path, text)


def test_a_directory_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        load_app(tmp_path)
    assert "relume init" in caught.value.hint


@pytest.mark.parametrize("place", ["missing", "file/below", "nul\0byte", "x" * 5000])
def test_directories_that_are_none(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        load_app(tmp_path / place)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/cerebrium.toml").mkdir()
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b/cerebrium.toml")
    for name in "ab":
        with pytest.raises(ConfigError, match=r"not a regular file|directory"):
            load_app(tmp_path / name)


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    escape = '[cerebrium.deployment]\nname = "a\\u001b[31m"\n"k\\u001b[2J" = "\\u001b[2J"\n'
    assert "\x1b" not in refused(tmp_path, escape).message
    (tmp_path / "cerebrium.toml").write_text(HEAD + '"k\\u001b[2J" = "\\u001b[2J"\n')
    (warning,) = load_app(tmp_path).warnings
    assert "\x1b" not in f"{warning}{warning.value}"


def test_things_that_are_hardly_meant(tmp_path: Path) -> None:
    (tmp_path / "cerebrium.toml").write_text(
        f"""{HEAD}
[cerebrium.hardware]
gpu_count = 2
[cerebrium.runtime.custom]
entrypoint = "a"
port = 8234
readycheck_endpoint = "ready"
[cerebrium.dependencies.paths]
pip = "requirements.txt"
[cerebrium.scaling]
min_replicas = 3
"""
    )
    found = {warning.key.rpartition(".")[2]: warning for warning in load_app(tmp_path).warnings}
    assert found["gpu_count"].message == 'no effect with compute = "CPU"'
    assert "checkpoint endpoint" in found["port"].message
    assert found["readycheck_endpoint"].message == 'read as "/ready"'
    assert "no such file" in found["pip"].message
    assert "below min_replicas" in found["max_replicas"].message
