"""``node.toml``: one machine's settings. All of it is optional; a node runs without the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from relume.config.app import Text, bad
from relume.config.document import read
from relume.config.keys import Key, Table
from relume.config.lenient import Remarks
from relume.config.reader import model_of, notice_what_is_not_acted_on
from relume.config.warning import ConfigWarning

_SCHEMES = ("file:", "s3:", "gs:", "az:", "memory:")


def _store_url(value: str) -> str:
    if not value.startswith(_SCHEMES) or not value.isprintable() or " " in value:
        raise bad("not the address of a store")
    return value


def _address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 <= int(port[:6]) <= 65535:
        raise bad("not an address")
    return value


class StoreSettings(Table):
    """``[store]``."""

    url: Annotated[
        str | None,
        AfterValidator(lambda value: value if value is None else _store_url(value)),
        Key(
            "a store that nodes share: every checkpoint is published there and found from there. Without one a node "
            "keeps to its own disk (docs/region.md)",
            allowed="file:PATH, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or memory:",
        ),
    ] = None
    max_cache_bytes: Annotated[
        int, Field(ge=0, le=2**60), Key("bytes of the store's checkpoints kept on this machine")
    ] = 50_000_000_000
    parallel: Annotated[
        int, Field(ge=1, le=256), Key("requests in flight of one upload or download; each takes about 12 MiB")
    ] = 8
    max_upload_bytes_per_second: Annotated[
        int | None, Field(ge=65536, le=2**40), Key("bandwidth that one upload may take; unlimited without")
    ] = None
    keep_checkpoints: Annotated[
        int | None,
        Field(ge=1, le=1_000_000),
        Key(
            "the newest checkpoints of each app, for each kind of machine, that stay; older ones are removed, in the "
            "whole region. All stay without"
        ),
    ] = None
    keep_days: Annotated[
        float | None,
        Field(gt=0, le=36500),
        Key("days after which a checkpoint is removed, in the whole region"),
    ] = None
    gc_grace_hours: Annotated[
        float,
        Field(ge=0, le=87600),
        Key(
            "hours that garbage collection leaves alone what nobody uses; longer than any instance pages from it"
        ),
    ] = 24.0


class RegionSettings(Table):
    """``[region]``."""

    name: Annotated[Text, Key("shown by `relume node status`; nodes that share a store share it")] = "local"
    key_file: Annotated[
        str | None,
        Key("a file of `relume keys new`; nodes with the same one trust each other. Relative to node.toml"),
    ] = None
    prefetch: Annotated[
        bool,
        Key("fetch the working sets of new checkpoints before they are asked for"),
    ] = False

    start_wait_s: Annotated[
        float,
        Field(ge=0.1, le=3600),
        Key(
            "seconds that a start, or an app's request for a checkpoint, waits for a store that does not answer; then "
            "it goes on without the region"
        ),
    ] = 10.0
    fault_wait_s: Annotated[
        float,
        Field(ge=0.1, le=3600),
        Key(
            "seconds that a running instance waits for memory from a store that does not answer; then it is ended and "
            "another takes its place"
        ),
    ] = 20.0


class Limits(Table):
    """``[node.limits]``."""

    max_instances: Annotated[
        int, Field(ge=1, le=10_000), Key("running and prepared instances: not counted yet", "accepted")
    ] = 200
    max_memory_bytes: Annotated[
        int | None,
        Field(ge=1, le=2**60),
        Key("bytes of memory limits given out in all, by default the machine's: not counted yet", "accepted"),
    ] = None


class NodeSettings(Table):
    """``[node]``."""

    listen: Annotated[
        str | None,
        AfterValidator(lambda value: value if value is None else _address(value)),
        Key("an address for HTTP besides the unix socket: none yet", "accepted", allowed="HOST:PORT"),
    ] = None
    allow_userfaultfd: Annotated[
        bool,
        Key("set vm.unprivileged_userfaultfd=1 while the node runs; without it restores read all memory"),
    ] = True
    dumps_in_memory: Annotated[
        Literal["auto", "always", "never"],
        Key(
            "write dumps to memory first, and to the disk when the app runs again: auto does where the disk is slower"
        ),
    ] = "auto"
    cdi_spec_dirs: Annotated[
        tuple[str, ...],
        Field(strict=False),
        Key("folders with CDI files, which name the devices and libraries of GPUs; a later folder wins"),
    ] = ("/etc/cdi", "/var/run/cdi")
    max_log_bytes: Annotated[
        int,
        Field(ge=4096, le=2**40),
        Key("bytes after which an instance's log is rotated; one rotated log is kept"),
    ] = 64 * 2**20
    limits: Annotated[Limits, Key("what instances may take together")] = Limits()


class NodeFile(Table):
    """A whole ``node.toml``."""

    store: Annotated[StoreSettings, Key("where checkpoints live")] = StoreSettings()
    region: Annotated[RegionSettings, Key("the nodes that share the store")] = RegionSettings()
    node: Annotated[NodeSettings, Key("this machine")] = NodeSettings()


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """A node's settings. ``file`` is None for the defaults; ``key_file`` is absolute."""

    file: Path | None
    store: StoreSettings
    region: RegionSettings
    node: NodeSettings
    warnings: tuple[ConfigWarning, ...]

    @property
    def key_file(self) -> Path | None:
        if self.region.key_file is None:
            return None
        return (self.file.parent if self.file else Path()) / self.region.key_file


def load_node(path: Path | None) -> NodeConfig:
    """Read a node's settings; the defaults for None. Raises ConfigError and nothing else."""
    if path is None:
        defaults = NodeFile()
        return NodeConfig(None, defaults.store, defaults.region, defaults.node, ())
    document = read(path.absolute(), hint_if_missing="a node also runs without one: `relume node run`")
    remarks = Remarks(document)
    file = model_of(NodeFile, document.data, remarks, strict=False)
    notice_what_is_not_acted_on(file, document.data, remarks)
    return NodeConfig(document.path, file.store, file.region, file.node, remarks.sorted())
