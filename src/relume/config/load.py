"""``load_app``: an app directory's ``cerebrium.toml`` as one value, with everything worth saying about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relume.config.app import (
    SIDECAR_PORT,
    AppFile,
    Dependencies,
    Deployment,
    Experimental,
    Hardware,
    Relume,
    Runtime,
    Scaling,
    app_name,
)
from relume.config.document import Document, read
from relume.config.keys import key_of
from relume.config.lenient import Remarks, misspelt_tables
from relume.config.reader import model_of, notice_what_is_not_acted_on, written_keys
from relume.config.warning import ConfigWarning, shown
from relume.errors import ConfigError

FILE_NAME = "cerebrium.toml"
_TOOLS = ("pip", "apt", "conda")


@dataclass(frozen=True, slots=True)
class AppConfig:
    """What an app asks for. ``directory`` and ``file`` are absolute."""

    directory: Path
    file: Path
    deployment: Deployment
    runtime: Runtime
    hardware: Hardware
    scaling: Scaling
    dependencies: Dependencies
    experimental: Experimental
    relume: Relume
    warnings: tuple[ConfigWarning, ...]

    @property
    def name(self) -> str:
        return self.deployment.name

    @property
    def checkpointing(self) -> bool:
        """Whether the app may ask for checkpoints, and starts from them."""
        return self.experimental.checkpointing

    @property
    def concurrency(self) -> int:
        """Requests that one instance takes at a time."""
        return self.scaling.replica_concurrency or (1 if self.hardware.accelerators else 100)

    def require_deployable(self, *, gpus: int | None = 0) -> None:
        """Raise ConfigError for what ``check`` only mentions: valid, but this node could not run it.

        ``gpus`` is how many an instance can get here; None leaves that to somebody who knows.
        """
        if partner := self.runtime.partner:
            raise ConfigError(
                f"{self.file}: cerebrium.runtime.{shown(partner)[1:-1]}: a partner's service, "
                "whose image only the vendor has",
                hint="run a server of your own with [cerebrium.runtime.custom]",
                key=f"cerebrium.runtime.{partner}",
            )
        if self.hardware.family == "neuron":
            raise ConfigError(
                f"{self.file}: cerebrium.hardware.compute = {shown(self.hardware.compute[0])}: "
                "these accelerators cannot be checkpointed and are not passed to instances",
                hint='use compute = "CPU" or an NVIDIA GPU',
                key="cerebrium.hardware.compute",
            )
        if gpus is not None and self.hardware.accelerators > gpus:
            raise ConfigError(
                f"{self.file}: cerebrium.hardware asks for {self.hardware.accelerators} x "
                f"{' or '.join(self.hardware.compute)}: an instance on this node can get {gpus or 'none'}",
                hint='use compute = "CPU", or another node',
                key="cerebrium.hardware.compute",
            )


def load_app(
    directory: Path, *, config_file: Path | None = None, name: str | None = None, strict: bool = False
) -> AppConfig:
    """Read an app's configuration.

    ``config_file`` is another file than ``cerebrium.toml``, taken below ``directory`` if relative; ``name``
    replaces the file's; ``strict`` makes unknown keys errors. Raises ConfigError and nothing else.
    """
    directory = directory.absolute()
    document = read(
        directory / (config_file or FILE_NAME),
        hint_if_missing=f"an app is a directory with a {FILE_NAME}; `relume init NAME` makes one",
    )
    remarks = Remarks(document)
    data = misspelt_tables(document.data, remarks)
    if name is not None:
        data = _renamed(data, name)
    _require_table(document, data)
    file = model_of(AppFile, data, remarks, strict=strict)
    notice_what_is_not_acted_on(file, data, remarks)
    _notice_partners(data, remarks)
    _notice_what_is_hardly_meant(file, data, directory, remarks)
    parts = file.cerebrium
    return AppConfig(
        directory=directory,
        file=document.path,
        deployment=parts.deployment,
        runtime=parts.runtime,
        hardware=parts.hardware,
        scaling=parts.scaling,
        dependencies=parts.dependencies,
        experimental=parts.experimental,
        relume=file.relume,
        warnings=remarks.sorted(),
    )


def require_app_name(name: str) -> None:
    """Raise ConfigError for a name, not from a file, that cannot be an app's."""
    try:
        app_name(name)
    except ValueError as error:
        allowed = key_of(Deployment.model_fields["name"]).allowed
        raise ConfigError(
            f"{shown(name)}: {error}", hint=f"allowed: {allowed}", key="name", value=shown(name)
        ) from None


def _renamed(data: dict[str, Any], name: str) -> dict[str, Any]:
    require_app_name(name)
    table = data.get("cerebrium")
    if not isinstance(table, dict) or not isinstance(table.get("deployment", {}), dict):
        return data
    return {**data, "cerebrium": {**table, "deployment": {**table.get("deployment", {}), "name": name}}}


def _require_table(document: Document, data: dict[str, Any]) -> None:
    table = data.get("cerebrium")
    if isinstance(table, dict) and "deployment" in table:
        return
    raise ConfigError(
        f"{document.path}: [cerebrium.deployment] is missing",
        hint='begin the file with:  [cerebrium.deployment]  and  name = "my-app"',
        file=str(document.path),
        key="cerebrium.deployment",
        allowed="a table with a name",
    )


def _notice_partners(data: dict[str, Any], remarks: Remarks) -> None:
    runtime = data["cerebrium"].get("runtime", {})
    for name in runtime:
        if name not in Runtime.model_fields and isinstance(runtime[name], dict):
            message = "a partner's service: `relume deploy` refuses it"
            remarks.add("not_acted", ("cerebrium", "runtime", name), message)


def _notice_what_is_hardly_meant(
    file: AppFile, data: dict[str, Any], directory: Path, remarks: Remarks
) -> None:
    written = written_keys(data, AppFile)
    _notice_hardware(file.cerebrium.hardware, ("cerebrium", "hardware", "gpu_count") in written, remarks)
    custom: tuple[str, ...] = ("cerebrium", "runtime", "custom")
    runtime = file.cerebrium.runtime.custom
    if runtime and runtime.port == SIDECAR_PORT:
        message = "the checkpoint endpoint has this port: use another"
        remarks.add("value", (*custom, "port"), message, value=runtime.port)
    for name in ("healthcheck_endpoint", "readycheck_endpoint"):
        endpoint = written.get((*custom, name))
        if endpoint and not endpoint.startswith("/"):
            remarks.add("spelling", (*custom, name), f'read as "/{endpoint}"', value=endpoint)
    for path in ((*custom, "dockerfile_path"), *(("cerebrium", "dependencies", "paths", t) for t in _TOOLS)):
        if path in written and not (directory / written[path]).is_file():
            remarks.add("value", path, "no such file in the app's directory", value=written[path])
    scaling = file.cerebrium.scaling
    if scaling.max_replicas < scaling.min_replicas:
        message = f"below min_replicas ({scaling.min_replicas})"
        remarks.add("value", ("cerebrium", "scaling", "max_replicas"), message, value=scaling.max_replicas)


def _notice_hardware(hardware: Hardware, count_written: bool, remarks: Remarks) -> None:
    table = ("cerebrium", "hardware")
    if count_written and hardware.family == "cpu" and hardware.gpu_count:
        remarks.add(
            "value", (*table, "gpu_count"), 'no effect with compute = "CPU"', value=hardware.gpu_count
        )
    elif count_written and hardware.family != "cpu" and not hardware.gpu_count:
        message = f"{hardware.compute[0]} is asked for, and none of it"
        remarks.add("value", (*table, "gpu_count"), message, value=0)
    if hardware.family == "neuron":
        remarks.add("not_acted", (*table, "compute"), "not an NVIDIA GPU: `relume deploy` refuses it")
