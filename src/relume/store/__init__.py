"""Checkpoints that survive, travel, and start a node that has never seen them.

`Region` is the front door. The format is docs/format.md, what it protects against docs/security.md. Nothing in
this room knows of instances, containers or CRIU's formats beyond the names of its page images.
"""

from relume.store.builds import BuildRecord, LayerRef
from relume.store.bundle import pack_tree, unpack_tree
from relume.store.cache import Pin
from relume.store.fetch import Fetched
from relume.store.keys import KeyWrapper, new_key_file, rotate_key_file
from relume.store.lease import Lease
from relume.store.manifest import Manifest
from relume.store.names import CheckpointName
from relume.store.objects import Counters, Objects, Patience
from relume.store.pages import RemotePages
from relume.store.publish import LocalCheckpoint
from relume.store.region import Region, RegionConfig
from relume.store.source import RemoteSource
from relume.store.upload import Limits, Progress
from relume.store.working_set import PageRun, read_from_files

__all__ = [
    "BuildRecord",
    "CheckpointName",
    "Counters",
    "Fetched",
    "KeyWrapper",
    "LayerRef",
    "Lease",
    "Limits",
    "LocalCheckpoint",
    "Manifest",
    "Objects",
    "PageRun",
    "Patience",
    "Pin",
    "Progress",
    "Region",
    "RegionConfig",
    "RemotePages",
    "RemoteSource",
    "new_key_file",
    "pack_tree",
    "read_from_files",
    "rotate_key_file",
    "unpack_tree",
]
