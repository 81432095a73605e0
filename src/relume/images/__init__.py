"""CRIU's image files: reading, editing, and knowing when their bytes are not what they were.

Public here: :func:`read_image` and :func:`write_image` for the small protobuf images, :func:`read_pagemap`
and :func:`lazy_bytes` for what lies in ``pages-*.img``, :mod:`relume.images.integrity` for their hashes.
The formats are those of CRIU 4.2 to 4.2.1; anything else is refused by name, never guessed at.
"""

from relume.images.files import Entry, read_entries, read_image, write_image
from relume.images.pagemap import PAGE_SIZE, Extent, Pagemap, lazy_bytes, pages_sizes, read_pagemap

__all__ = [
    "PAGE_SIZE",
    "Entry",
    "Extent",
    "Pagemap",
    "lazy_bytes",
    "pages_sizes",
    "read_entries",
    "read_image",
    "read_pagemap",
    "write_image",
]
