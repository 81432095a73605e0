"""Makes the ``*_pb2.py`` and ``*_pb2.pyi`` files of this folder from the ``.proto`` files beside them.

The ``.proto`` files are CRIU 4.2.1's ``images/*.proto`` as they are (MIT, see LICENSE), and relume.proto; to move to another
CRIU, copy its files over these and run ``python -m relume.images.proto.generate``. protoc writes imports
between the modules as if they lay at the top of ``sys.path``; they are rewritten to this package, so that
nothing outside has to know of them and another copy (CRIU's own ``pycriu``) does not get in the way.

Needs ``grpcio-tools`` (a development dependency; nothing at run time).
"""

from __future__ import annotations

import re
import sys
from importlib import resources
from pathlib import Path

PACKAGE = "relume.images.proto"
_IMPORT = re.compile(r"^import (\w+_pb2)", re.MULTILINE)


def generate(folder: Path) -> int:
    """Writes the modules for every ``.proto`` in ``folder``; returns how many. Raises SystemExit when protoc fails."""
    from grpc_tools import protoc

    protos = sorted(path.name for path in folder.glob("*.proto"))
    include = str(resources.files("grpc_tools") / "_proto")
    arguments = ["protoc", f"-I{folder}", f"-I{include}", f"--python_out={folder}", f"--pyi_out={folder}"]
    if status := protoc.main([*arguments, *protos]):
        raise SystemExit(status)
    for path in [*folder.glob("*_pb2.py"), *folder.glob("*_pb2.pyi")]:
        text = path.read_text()
        path.write_text(_IMPORT.sub(rf"from {PACKAGE} import \1", text))
    return len(protos)


if __name__ == "__main__":
    print(f"{generate(Path(__file__).parent)} modules", file=sys.stderr)
