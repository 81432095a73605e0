"""Builds: base, dependencies and app files as read-only layers, and the ``build_id`` that names them."""

from relume.build.builder import Builder, Planned
from relume.build.model import Build, Layer

__all__ = ["Build", "Builder", "Layer", "Planned"]
