"""The models of ``cerebrium.toml``: every published key, its default and its range.

Where the vendor's page and its server disagree on a default, the server's holds: an app got that one so far.
``[relume.*]`` is ours and stands outside of ``[cerebrium]``, where the vendor's parser ignores it.
Units are in the notes: seconds and bytes, except ``memory``, which the file writes in GB.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from relume.config.keys import Key, Table

SIDECAR_PORT = 8234

ACCELERATORS: Mapping[str, str] = {
    "TURING_T4": "gpu",
    "AMPERE_A10": "gpu",
    "AMPERE_A100": "gpu",
    "AMPERE_A100_80GB": "gpu",
    "ADA_L4": "gpu",
    "ADA_L40": "gpu",
    "HOPPER_H100": "gpu",
    "HOPPER_H200": "gpu",
    "TRN1": "neuron",
    "INF2": "neuron",
}
"""Compute name -> family. ``CPU`` is a family of its own."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_NAME_ALLOWED = "1 to 63 letters, digits, - and _, beginning and ending with a letter or digit"
_SHELL = re.compile(r"[|&;<>$`*?~#(){}\[\]\n]")

NO_AUTOSCALER = "no autoscaler yet: `relume start` starts each instance"


def bad(message: str, *, key: str = "", allowed: str = "") -> PydanticCustomError:
    """A validation error that may name the key below the table it was found in."""
    return PydanticCustomError("relume", "{message}", {"message": message, "key": key, "allowed": allowed})


def app_name(value: str) -> str:
    """A name becomes a directory, a host name and part of a URL, so nothing else is let through."""
    if not _NAME.fullmatch(value):
        raise bad("not a name that can become a directory and a host name")
    return value


def _inside(value: str) -> str:
    """A path below the app's directory."""
    if not value or value.startswith(("/", "~")) or ".." in value.split("/") or not value.isprintable():
        raise bad("must be a path inside the app's directory")
    return value


def _line(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise bad("must be one line of text without control characters")
    return value


def _endpoint(value: str) -> str:
    if not value.isprintable() or any(c.isspace() or c in "#\\" for c in value) or not value.isascii():
        raise bad("must be a path of a URL")
    return value if value.startswith("/") or not value else f"/{value}"


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise bad("must not hold a NUL character")
    return value


def _words(value: Any) -> Any:
    """An entrypoint written as one text: split like a shell would, or given to one if it uses its signs."""
    if not isinstance(value, str):
        return value
    if _SHELL.search(value):
        return ["/bin/sh", "-c", value]
    try:
        return shlex.split(value)
    except ValueError as error:
        raise bad(f"cannot be split into words: {error}") from None


def _some_words(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or not value[0]:
        raise bad("must name a program")
    return value


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _compute(value: tuple[str, ...]) -> tuple[str, ...]:
    if not 1 <= len(value) <= 5:
        raise bad("must be 1 to 5 names")
    if unknown := [name for name in value if name != "CPU" and name not in ACCELERATORS]:
        raise bad(f"no compute of the name {unknown[0]!a}"[:120])
    if len({ACCELERATORS.get(name, "cpu") for name in value}) > 1:
        raise bad("names of different families cannot be mixed")
    return value


def _packages(value: dict[str, str]) -> dict[str, str]:
    """Names and versions go onto the command lines and into the files of package tools: no options, no
    second lines."""
    for name, version in value.items():
        if not name.strip() or not name.isprintable() or name.startswith("-"):
            raise bad(f"not a package name: {name!a}"[:120], key=name)
        if not version.isprintable() or version.startswith("-"):
            raise bad(f"not a version: {version!a}"[:120], key=name)
    return value


Text = Annotated[str, AfterValidator(_line)]
Command = Annotated[str, AfterValidator(_no_nul)]
Commands = Annotated[tuple[Command, ...], Field(strict=False)]
Packages = Annotated[dict[str, str], AfterValidator(_packages)]
PathInside = Annotated[str, AfterValidator(_inside)]
Endpoint = Annotated[str, AfterValidator(_endpoint)]
_VERSIONS = '"latest" or a version such as "1.2", "==1.2" or ">=1,<2", by package name'


class Deployment(Table):
    """``[cerebrium.deployment]``: what goes into a build."""

    name: Annotated[
        str,
        AfterValidator(app_name),
        Key("the app's name, its directory and its host name", allowed=_NAME_ALLOWED),
    ]
    python_version: Annotated[
        Literal["3.10", "3.11", "3.12", "3.13"], Key("the base's own Python where it fits, else one by uv")
    ] = "3.11"
    disable_auth: Annotated[
        bool,
        Key("instances listen on the host's loopback, without a login", "accepted", matches=(True,)),
    ] = True
    include: Annotated[Commands, Key("patterns of files that belong to the app")] = (
        "./*",
        "main.py",
        "cerebrium.toml",
    )
    exclude: Annotated[Commands, Key("patterns of files that don't")] = (".*",)
    shell_commands: Annotated[Commands, Key("run at the end of the build")] = ()
    pre_build_commands: Annotated[Commands, Key("run before dependencies are installed")] = ()
    docker_base_image_url: Annotated[
        Text,
        Key("a registry's image, `oci:PATH` or `docker-archive:PATH`; Debian's is made without a registry"),
    ] = "debian:bookworm-slim"
    use_uv: Annotated[bool, Key("pip dependencies are installed by uv")] = False
    deployment_initialization_timeout: Annotated[
        int, Field(ge=60, le=830), Key("seconds that an instance has to become ready")
    ] = 600


class CustomRuntime(Table):
    """``[cerebrium.runtime.custom]``: a server of the app's own."""

    entrypoint: Annotated[
        tuple[Command, ...] | None,
        Field(strict=False),
        BeforeValidator(_words),
        AfterValidator(lambda value: value if value is None else _some_words(value)),
        Key(
            "the command; a single text is split into words, or run by /bin/sh if it uses a shell's signs",
            allowed="a list of texts or one text; needed unless dockerfile_path is set",
        ),
    ] = None
    port: Annotated[int, Field(ge=1, le=65535), Key("where the app listens")] = 8000
    healthcheck_endpoint: Annotated[
        Endpoint,
        Key("instances are not restarted by a probe", "accepted", allowed="a path such as /health, or empty"),
    ] = ""
    readycheck_endpoint: Annotated[
        Endpoint,
        Key(
            "ready once it answers 2xx; empty: once the port accepts",
            allowed="a path such as /ready, or empty",
        ),
    ] = ""
    dockerfile_path: Annotated[
        PathInside | None, Key("the build's base, by buildah", allowed="a path inside the app's directory")
    ] = None

    @model_validator(mode="after")
    def _has_a_command(self) -> CustomRuntime:
        if self.entrypoint is None and self.dockerfile_path is None:
            raise bad(
                "is missing (or set dockerfile_path)", key="entrypoint", allowed="a list of texts or one text"
            )
        return self


class PartnerRuntime(Table):
    """``[cerebrium.runtime.<partner>]``: images that only the vendor has."""

    port: Annotated[int | None, Field(ge=1, le=65535), Key("belongs to a partner's service", "refused")] = (
        None
    )
    model_name: Annotated[str | None, Key("belongs to a partner's service", "refused")] = None
    language: Annotated[str | None, Key("belongs to a partner's service", "refused")] = None
    image_version: Annotated[str | None, Key("belongs to a partner's service", "refused")] = None


class Runtime(Table):
    """``[cerebrium.runtime]``. A sub-table of any other name than ``custom`` is a partner's service."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, PartnerRuntime] = Field(init=False)
    SUBTABLES = PartnerRuntime

    container_runtime: Annotated[
        Literal["v1", "v2"],
        Key("instances always run under runc, which is v1; v2 is gVisor", "accepted", matches=("v1",)),
    ] = "v1"
    custom: Annotated[CustomRuntime | None, Key("a server of the app's own")] = None

    @property
    def partner(self) -> str | None:
        """The partner's service that the file asks for; ``deploy`` refuses it."""
        return next(iter(self.__pydantic_extra__ or {}), None)


class Hardware(Table):
    """``[cerebrium.hardware]``."""

    cpu: Annotated[float, Field(gt=0, le=1024), Key("limit of the instance's cgroup, in CPUs")] = 2.0
    memory: Annotated[
        float, Field(gt=0, le=65536), Key("limit of the instance's cgroup, in GB (2^30 bytes)")
    ] = 4.0
    compute: Annotated[
        tuple[str, ...],
        Field(strict=False),
        BeforeValidator(_one_as_list),
        AfterValidator(_compute),
        Key(
            "matched by name to the GPUs of this node; `deploy` refuses what an instance could not get here",
            allowed=f"up to 5 of one family: CPU, {', '.join(ACCELERATORS)}",
        ),
    ] = ("CPU",)
    gpu_count: Annotated[
        int, Field(ge=0, le=8), Key("GPUs per instance; by default 1 with an accelerator, else 0")
    ] = 0
    provider: Annotated[
        Literal["aws", "crusoe", "nebius"] | None, Key("an instance runs on this node", "accepted")
    ] = None
    region: Annotated[str | None, Key("an instance runs on this node", "accepted")] = None

    @model_validator(mode="before")
    @classmethod
    def _one_accelerator(cls, data: Any) -> Any:
        if (
            isinstance(data, dict)
            and "gpu_count" not in data
            and data.get("compute", "CPU") not in ("CPU", ["CPU"])
        ):
            return {**data, "gpu_count": 1}
        return data

    @property
    def family(self) -> str:
        """``cpu``, ``gpu`` or ``neuron``."""
        return ACCELERATORS.get(self.compute[0], "cpu")

    @property
    def accelerators(self) -> int:
        """How many devices an instance gets; 0 without an accelerator, whatever ``gpu_count`` says."""
        return 0 if self.family == "cpu" else self.gpu_count

    @property
    def memory_bytes(self) -> int:
        return int(self.memory * 2**30)


def _scaling(note: str = NO_AUTOSCALER) -> Key:
    return Key(note, "accepted")


class Scaling(Table):
    """``[cerebrium.scaling]``: read and checked, so that a file that passes here passes there."""

    min_replicas: Annotated[int, Field(ge=0, le=10_000), _scaling()] = 0
    max_replicas: Annotated[int, Field(ge=1, le=10_000), _scaling()] = 1
    replica_concurrency: Annotated[
        int | None,
        Field(ge=1, le=100_000),
        Key(
            "calls that functions of main.py take at once; by default 1 with a GPU, else 100. A server counts its own"
        ),
    ] = None
    scaling_metric: Annotated[
        Literal["concurrency_utilization", "requests_per_second", "cpu_utilization", "memory_utilization"],
        _scaling(),
    ] = "concurrency_utilization"
    scaling_target: Annotated[int, Field(ge=1, le=1_000_000), _scaling()] = 100
    scaling_buffer: Annotated[int, Field(ge=0, le=10_000), _scaling()] = 0
    cooldown: Annotated[int, Field(ge=0, le=3600), _scaling(f"seconds; {NO_AUTOSCALER}")] = 10
    response_grace_period: Annotated[
        int, Field(ge=16, le=43200), _scaling("seconds; requests are not timed")
    ] = 900
    evaluation_interval_seconds: Annotated[int, Field(ge=6, le=300), _scaling()] = 30
    load_balancing_algorithm: Annotated[
        Literal["round-robin", "first-available", "min-connections", "random-choice-2"] | None, _scaling()
    ] = None
    compute_tier: Annotated[
        Literal["interruptible", "protected"] | None, _scaling("an instance runs on this node")
    ] = None
    roll_out_duration_seconds: Annotated[
        int, Field(ge=0, le=21600), _scaling("a new build is used by the next start")
    ] = 0

    @model_validator(mode="after")
    def _metric_can_scale(self) -> Scaling:
        if self.scaling_metric in ("cpu_utilization", "memory_utilization"):
            if self.min_replicas == 0:
                raise bad(
                    f"{self.scaling_metric} cannot wake an app at 0 replicas",
                    key="scaling_metric",
                    allowed="cpu_utilization and memory_utilization need min_replicas of 1 or more",
                )
            if self.scaling_buffer:
                raise bad(
                    f"{self.scaling_metric} does not go with a scaling_buffer",
                    key="scaling_buffer",
                    allowed="0 with cpu_utilization and memory_utilization",
                )
        return self


class DependencyFiles(Table):
    """``[cerebrium.dependencies.paths]``: requirement files of the app."""

    pip: Annotated[
        PathInside | None, Key("a requirements file", allowed="a path inside the app's directory")
    ] = None
    apt: Annotated[
        PathInside | None, Key("one package a line", allowed="a path inside the app's directory")
    ] = None
    conda: Annotated[
        PathInside | None,
        Key("refused by the build where no conda tool is there", allowed="a path inside the app's directory"),
    ] = None


class Dependencies(Table):
    """``[cerebrium.dependencies]``. Tables keep the file's order; keys may carry extras or be git URLs."""

    pip: Annotated[Packages, Key("Python packages", allowed=_VERSIONS)] = Field(default_factory=dict)
    apt: Annotated[Packages, Key("Debian packages", allowed=_VERSIONS)] = Field(default_factory=dict)
    conda: Annotated[
        Packages, Key("refused by the build where no conda tool is there", allowed=_VERSIONS)
    ] = Field(default_factory=dict)
    paths: Annotated[DependencyFiles, Key("files instead of tables")] = DependencyFiles()


class Experimental(Table):
    """``[cerebrium.experimental]``."""

    checkpointing: Annotated[bool, Key("lets the app ask for a checkpoint, and starts from it")] = False


class CheckpointPolicy(Table):
    """``[relume.checkpoint]``: how checkpoints of this app are made and used."""

    trigger: Annotated[
        Literal["request", "ready"], Key("when the app asks, or when it first becomes ready")
    ] = "request"
    filesystem: Annotated[
        Literal["held", "all"], Key("save the files that processes hold, or the whole writable layer")
    ] = "held"
    fill: Annotated[
        Literal["all", "demand"], Key("fill the memory in the background, or only what is touched")
    ] = "all"
    loopback: Annotated[
        Literal["keep", "close"], Key("connections with both ends inside: kept, or closed like all others")
    ] = "keep"
    max_held_file_bytes: Annotated[
        int, Field(ge=0, le=2**40), Key("bytes; a larger held file fails the checkpoint")
    ] = 1_000_000_000
    prepared: Annotated[
        int,
        Field(ge=0, le=64),
        Key("instances restored ahead of need and held before their first instruction"),
    ] = 0
    prepared_fill: Annotated[
        Literal["working-set", "none"], Key("what a prepared instance already has in memory")
    ] = "working-set"
    prepared_max_age_s: Annotated[
        int, Field(ge=1, le=86400), Key("seconds until a prepared instance is made anew")
    ] = 300


class Relume(Table):
    """``[relume]``: ours; the vendor ignores it."""

    checkpoint: Annotated[CheckpointPolicy, Key("how checkpoints are made and used")] = CheckpointPolicy()


class Cerebrium(Table):
    """``[cerebrium]``."""

    deployment: Annotated[Deployment, Key("what goes into a build")]
    runtime: Annotated[Runtime, Key("how it is run")] = Runtime()
    hardware: Annotated[Hardware, Key("what it gets")] = Hardware()
    scaling: Annotated[Scaling, Key("how many")] = Scaling()
    dependencies: Annotated[Dependencies, Key("what is installed")] = Field(default_factory=Dependencies)
    experimental: Annotated[Experimental, Key("experimental switches")] = Experimental()


class AppFile(Table):
    """A whole ``cerebrium.toml``."""

    cerebrium: Annotated[Cerebrium, Key("the vendor's tables")]
    relume: Annotated[Relume, Key("relume's own tables")] = Relume()
