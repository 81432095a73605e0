"""Opening files where a path comes from somebody else."""

from __future__ import annotations

import os
import struct

from relume.linux import syscall

_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10


def open_below(root: int, path: str, flags: int) -> int:
    """openat2(2) with ``root``, a directory's descriptor, as ``/``: ``..`` and links cannot lead out of it.

    Raises OSError.
    """
    how = struct.pack("QQQ", flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return syscall.call(_OPENAT2, root, os.fsencode(path), how, len(how), what=path)
