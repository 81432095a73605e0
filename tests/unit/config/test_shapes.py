"""Files in the shapes that public apps have: all are understood, and what is said about them is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.config import AppConfig, load_app
from relume.errors import ConfigError

SHAPES = Path(__file__).parent / "shapes"


def load(name: str) -> AppConfig:
    return load_app(SHAPES / name)


def said(config: AppConfig) -> dict[str, str]:
    return {warning.key: warning.message for warning in config.warnings}


@pytest.mark.parametrize("shape", sorted(path.name for path in SHAPES.iterdir()))
def test_every_shape_is_understood(shape: str) -> None:
    config = load(shape)
    assert config.name
    assert all(warning.line for warning in config.warnings)
    assert not [warning for warning in config.warnings if warning.kind == "unknown"]


def test_defaults_are_the_servers() -> None:
    config = load("minimal")
    assert config.warnings == ()
    assert config.deployment.python_version == "3.11"
    assert config.deployment.disable_auth is True
    assert config.deployment.include == ("./*", "main.py", "cerebrium.toml")
    assert config.deployment.exclude == (".*",)
    assert config.deployment.docker_base_image_url == "debian:bookworm-slim"
    assert config.deployment.deployment_initialization_timeout == 600
    assert config.runtime.custom is None
    assert (config.hardware.cpu, config.hardware.memory_bytes) == (2.0, 4 * 2**30)
    assert config.hardware.compute == ("CPU",)
    assert config.hardware.gpu_count == 0
    assert config.concurrency == 100
    assert config.scaling.cooldown == 10
    assert config.scaling.response_grace_period == 900
    assert config.checkpointing is False
    policy = config.relume.checkpoint
    assert (policy.trigger, policy.filesystem, policy.fill, policy.loopback) == (
        "request",
        "held",
        "all",
        "keep",
    )
    assert (policy.prepared, policy.prepared_fill, policy.prepared_max_age_s) == (0, "working-set", 300)
    assert policy.max_held_file_bytes == 10**9


def test_gpu_app() -> None:
    config = load("gpu-transformer")
    assert config.hardware.accelerators == 1
    assert config.concurrency == 1
    assert config.dependencies.pip == {
        "torch": ">=2.0.0",
        "transformers[torch]": "latest",
        "accelerate": "latest",
        "pydantic": "==2.7.1",
    }
    assert set(said(config)) == {
        "cerebrium.hardware.region",
        "cerebrium.hardware.provider",
        "cerebrium.scaling.min_replicas",
        "cerebrium.scaling.max_replicas",
        "cerebrium.scaling.cooldown",
    }


def test_an_accelerator_counts_one_where_no_count_is_written() -> None:
    assert load("deepgram-partner").hardware.gpu_count == 1


def test_custom_runtime() -> None:
    config = load("fastapi-custom")
    assert config.runtime.custom is not None
    assert config.runtime.custom.entrypoint[:2] == ("uvicorn", "app.main:app")
    assert config.runtime.custom.port == 5000
    assert "login" in said(config)["cerebrium.deployment.disable_auth"]
    assert config.dependencies.pip["uvicorn[standard]"] == "latest"


def test_an_entrypoint_of_one_text_is_split_or_given_to_a_shell() -> None:
    plain, shell = load("entrypoint-text").runtime.custom, load("entrypoint-shell").runtime.custom
    assert plain and plain.entrypoint == ("python", "-m", "http.server", "8000", "--directory", "my files")
    assert shell and shell.entrypoint == ("/bin/sh", "-c", "exec node server.js --port $PORT && true")


def test_vllm() -> None:
    config = load("vllm-checkpointing")
    assert config.checkpointing
    assert config.hardware.compute == ("HOPPER_H100", "HOPPER_H200")
    assert config.relume.checkpoint.filesystem == "all"
    assert config.relume.checkpoint.prepared == 2
    assert "git+https://github.com/example/tokenizer-extras.git@v1.2#egg=extras" in config.dependencies.pip


def test_commands_may_look_like_toml() -> None:
    config = load("commands")
    assert config.deployment.shell_commands[1] == "set -e\n[not.a.header]\necho key = value\n"


def test_misspelt_dependencies_are_dependencies() -> None:
    config = load("misspelt-dependencies")
    assert config.dependencies.pip == {"numpy": "latest"}
    (warning,) = config.warnings
    assert (warning.kind, warning.line) == ("spelling", 4)


def test_a_list_that_was_written_as_a_text_is_a_list() -> None:
    config = load("include-text")
    assert config.deployment.include == ("./*", "main.py", "cerebrium.toml", "my-model.py")
    assert config.deployment.exclude == ("./example_exclude", ".*")
    # A command may look like that and be one.
    assert config.deployment.shell_commands == ("[ -f a, ] || [ -f b ]",)
    assert [(warning.kind, warning.line) for warning in config.warnings] == [
        ("spelling", 4),
        ("spelling", 5),
        ("spelling", 6),
    ]


def test_versions_keep_the_digits_that_were_written() -> None:
    config = load("unquoted-versions")
    assert config.deployment.python_version == "3.10"
    assert config.dependencies.pip == {"numpy": "1.20"}
    assert (config.hardware.cpu, config.hardware.memory) == (2.0, 16.5)
    assert {warning.kind for warning in config.warnings} == {"spelling"}


@pytest.mark.parametrize("shape", ["rime-partner", "deepgram-partner", "neuron"])
def test_what_only_the_vendor_has_is_mentioned_and_not_deployed(shape: str) -> None:
    config = load(shape)
    assert any("refuses it" in message for message in said(config).values())
    with pytest.raises(ConfigError) as caught:
        config.require_deployable()
    assert caught.value.hint


@pytest.mark.parametrize("shape", ["minimal", "fastapi-custom", "vllm-checkpointing", "gvisor", "dockerfile"])
def test_what_a_node_can_run_is_deployable(shape: str) -> None:
    load(shape).require_deployable(gpus=2)


def test_gpus_are_counted() -> None:
    config = load("vllm-checkpointing")
    config.require_deployable(gpus=None)
    for gpus, can_get in ((0, "none"), (1, "1")):
        with pytest.raises(ConfigError, match=f"asks for 2 x HOPPER_H100 .* can get {can_get}"):
            config.require_deployable(gpus=gpus)
