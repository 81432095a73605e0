"""`relume checkpoints ls|inspect|verify|rm|explain`, and for a region `pull|export|import|gc`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from relume.cli.arguments import Parser
from relume.cli.client import NodeClient, segment
from relume.cli.render import Screen, size

COLUMNS = (
    ("checkpoint_id", "CHECKPOINT"),
    ("app", "APP"),
    ("build_id", "BUILD"),
    ("state", "STATE"),
    ("where", "WHERE"),
    ("upload", "UPLOAD"),
    ("size_bytes", "SIZE"),
    ("created_at", "CREATED"),
)


def configure(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    verbs.add_parser("ls", help="list checkpoints").runs(list_checkpoints)
    for command, summary in (
        (inspect, "show its processes, memory, sizes and platform"),
        (verify, "read it whole and compare it with its hashes; exit status 1 if it is damaged"),
        (remove, "remove it; the next instance of its build boots cold and may make a new one"),
    ):
        verb = verbs.add_parser("rm" if command is remove else command.__name__, help=summary)
        verb.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint's id")
        verb.runs(command)
    verb = verbs.add_parser("pull", help="bring the region's checkpoint onto this node, whole")
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint's id")
    verb.runs(pull)
    verb = verbs.add_parser("export", help="write the region's checkpoint into one file")
    verb.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint's id")
    verb.add_argument("file", metavar="FILE", help="the file to make; it stays encrypted and signed")
    verb.runs(export)
    verb = verbs.add_parser("import", help="put what export wrote into the region")
    verb.add_argument("file", metavar="FILE", help="a file of `relume checkpoints export`")
    verb.runs(import_)
    verb = verbs.add_parser("gc", help="what the region's garbage collection would delete")
    verb.add_argument("--delete", action="store_true", help="delete it")
    verb.runs(collect)
    verb = verbs.add_parser(
        "explain",
        help="would a checkpoint work, how large would it be, how long would it take? freezes nothing",
    )
    verb.add_argument("instance", metavar="INSTANCE", help="a running instance")
    verb.runs(explain)


def list_checkpoints(options: Namespace) -> None:
    Screen(options.output).table(NodeClient().get("/v1/checkpoints"), COLUMNS, empty="No checkpoints.")


def inspect(options: Namespace) -> None:
    found = NodeClient().get(f"/v1/checkpoints/{segment(options.checkpoint)}")
    screen = Screen(options.output)
    screen.record(found if screen.as_json else _in_words(found))


def _in_words(found: dict[str, Any]) -> dict[str, Any]:
    """The same for people: processes and mappings in a word each, what the region knows as fields of their own."""
    words = dict(found)
    words["processes"] = ", ".join(
        f"{one['name']} (pid {one['pid']}) {size(one['memory_bytes'])}" for one in found.get("processes", ())
    )
    words["mappings"] = ", ".join(
        f"{one['what']} (pid {one['pid']}) {size(one['saved_bytes'])}" for one in found.get("mappings", ())
    )
    for name, value in (words.pop("region", None) or {}).items():
        words[f"region_{name}"] = value
    for name in ("would_be_used", "why_not"):  # last, because they are what is looked for
        if name in words:
            words[name] = words.pop(name)
    return words


def verify(options: Namespace) -> int:
    result = NodeClient().post(f"/v1/checkpoints/{segment(options.checkpoint)}/verify")
    Screen(options.output).record(result)
    return 0 if result["ok"] else 1


def remove(options: Namespace) -> None:
    NodeClient().delete(f"/v1/checkpoints/{segment(options.checkpoint)}")
    Screen(options.output).removed("checkpoint_id", options.checkpoint)


def explain(options: Namespace) -> None:
    Screen(options.output).record(NodeClient().post(f"/v1/instances/{segment(options.instance)}/explain"))


def pull(options: Namespace) -> None:
    Screen(options.output).record(NodeClient().post(f"/v1/checkpoints/{segment(options.checkpoint)}/pull"))


def export(options: Namespace) -> None:
    path = f"/v1/checkpoints/{segment(options.checkpoint)}/export"
    Screen(options.output).record(NodeClient().post(path, _file(options)))


def import_(options: Namespace) -> None:
    Screen(options.output).record(NodeClient().post("/v1/region/import", _file(options)))


def collect(options: Namespace) -> None:
    Screen(options.output).record(NodeClient().post("/v1/region/gc", {"delete": options.delete}))


def _file(options: Namespace) -> dict[str, str]:
    """The node reads and writes it, so the path is made absolute where it was typed."""
    return {"file": str(Path(options.file).absolute())}
