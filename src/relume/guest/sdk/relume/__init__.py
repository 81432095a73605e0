"""relume, from inside a container: take a checkpoint, notice a restore, be unique again after it.

    import relume

    model = load_everything()
    result = relume.checkpoint()
    if result.restored:
        ...                     # this process began its life in another container

Nothing here is needed to be checkpointed: the endpoint is plain HTTP (``POST
http://169.254.169.253:8234/checkpoint``). This module is that request done right. It works outside relume
too, where ``checkpoint()`` returns at once and says so.

Standard library only, Python 3.8 or newer, no threads, no import of anything heavy.
"""

from ._checkpoint import Checkpoint, HookFailed, after_restore, before_checkpoint, checkpoint
from ._environment import refresh_env
from ._randomness import Reseeded, reseed
from ._sidecar import restore_id

__all__ = [
    "Checkpoint",
    "HookFailed",
    "Reseeded",
    "after_restore",
    "before_checkpoint",
    "checkpoint",
    "refresh_env",
    "reseed",
    "restore_id",
]
