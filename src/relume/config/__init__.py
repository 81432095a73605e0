"""cerebrium.toml and node.toml: models, parsing, errors that name file, line, key and fix."""

from relume.config.app import (
    CheckpointPolicy,
    CustomRuntime,
    Dependencies,
    DependencyFiles,
    Deployment,
    Experimental,
    Hardware,
    PartnerRuntime,
    Relume,
    Runtime,
    Scaling,
)
from relume.config.load import FILE_NAME, AppConfig, load_app, require_app_name
from relume.config.node import Limits, NodeConfig, NodeSettings, RegionSettings, StoreSettings, load_node
from relume.config.warning import ConfigWarning

__all__ = [
    "FILE_NAME",
    "AppConfig",
    "CheckpointPolicy",
    "ConfigWarning",
    "CustomRuntime",
    "Dependencies",
    "DependencyFiles",
    "Deployment",
    "Experimental",
    "Hardware",
    "Limits",
    "NodeConfig",
    "NodeSettings",
    "PartnerRuntime",
    "RegionSettings",
    "Relume",
    "Runtime",
    "Scaling",
    "StoreSettings",
    "load_app",
    "load_node",
    "require_app_name",
]
