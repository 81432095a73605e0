"""docs/compatibility.md, made from the models.

``python -m relume.config.compatibility > docs/compatibility.md`` writes it.

A test compares the file with this output, and the models with the published list of keys, so that no key can
be added, changed or forgotten in one place only.
"""

from __future__ import annotations

import sys

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from relume.config.app import AppFile, PartnerRuntime
from relume.config.keys import Table, allowed, key_of, leaves
from relume.config.node import NodeFile
from relume.config.warning import shown

_HEAD = """\
# Compatibility: every key, and what relume does with it

`relume check` prints the same for an app of yours. Three answers:

* **acted on**: it does what the vendor's reference says, on one node.
* **accepted**: read and checked, so that a file that passes here passes there; it has no effect, and
  `relume check` says so. Exit status 0.
* **refused**: `relume check` mentions it, `relume deploy` says no.

A key that is not listed is ignored with a warning that names what was probably meant; `relume check --strict`
makes it an error. A value out of range is an error with file, line, key, value and what is allowed; exit status 2.
Where the vendor's page and its server disagree on a default, the default below is the server's.

Which programs were tried, with a row for each: [compat-apps.md](compat-apps.md).

This page is made from the models (`python -m relume.config.compatibility`); a test holds it against them.

## cerebrium.toml
"""

_SPELLINGS = """
### Other spellings that are understood, with a warning

* `[cerebrium.pip.dependancies]` (also `dependencies`; also for apt and conda) is
  `[cerebrium.dependencies.pip]`.
* Numbers and switches in quotes: `cpu = "2"`, `disable_auth = "true"`; whole numbers written `1.0`.
* Versions without quotes: `python_version = 3.10`, `numpy = 1.20`.
* One text where a list is due: `shell_commands = "make"`; `include` and `exclude` also as
  `"[./*, main.py, cerebrium.toml]"`, as the vendor's CLI wrote it in 2024.
* CRLF line ends and a byte order mark, without a warning. A file over 256 KiB is refused.

## node.toml

Settings of a node (`relume node run --config node.toml`); all optional.
"""


def table() -> str:
    """The whole page."""
    rows = [*_sections(AppFile), _section("cerebrium.runtime.<partner>", list(leaves(PartnerRuntime)))]
    return _HEAD + "".join(rows) + _SPELLINGS + "".join(_sections(NodeFile))


def _sections(model: type[Table]) -> list[str]:
    tables: dict[str, list[tuple[tuple[str, ...], FieldInfo]]] = {}
    for path, field in leaves(model):
        tables.setdefault(".".join(path[:-1]), []).append((path, field))
    return [_section(name, found) for name, found in tables.items()]


def _section(name: str, keys: list[tuple[tuple[str, ...], FieldInfo]]) -> str:
    lines = [
        f"\n### [{name}]\n",
        "| key | values | default | relume | what it does |",
        "|---|---|---|---|---|",
    ]
    for path, field in keys:
        key = key_of(field)
        cells = (f"`{path[-1]}`", allowed(field), _default(field), key.support, key.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    return f"`{shown(value)}`" if value != {} else "empty"


if __name__ == "__main__":
    sys.stdout.write(table())
