"""The `relume` command: from arguments to an exit status.

Importing this, and what a command imports, is part of every `relume start`: files here import nothing heavier than
argparse and json at their top. `python -X importtime -m relume.cli.main ps` shows it, and a test bounds it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from relume.cli import render
from relume.cli.arguments import COMMANDS, parser
from relume.errors import RelumeError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, the error's own, or 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal's encoding may lack a character: never fail on one
            stream.reconfigure(errors="replace")
    try:
        return _run(arguments)
    except RelumeError as failure:
        render.error(failure, as_json=_wants_json(arguments))
        return failure.exit_code
    except KeyboardInterrupt:
        render.interrupted()
        return 130
    except BrokenPipeError:  # who read our output has seen enough; keep the exit of Python quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except SystemExit as end:  # argparse's, after --help
        return end.code if isinstance(end.code, int) else 0


def _run(arguments: list[str]) -> int:
    invoked = next((word for word in arguments if not word.startswith("-")), "")
    top = parser(invoked)
    options = top.parse_args(arguments)
    if options.version:
        from importlib.metadata import version

        sys.stdout.write(f"relume {version('relume')}\n")
        return 0
    if invoked not in COMMANDS:
        top.print_help(sys.stderr)
        return 2
    status = options.run(options)
    return status if isinstance(status, int) else 0


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether errors are to be JSON: known before, and without, a command line that parses."""
    words = f" {' '.join(arguments)} ".replace("=", " ")
    return any(form in words for form in (" -o json ", " -ojson ", " --output json ", " --json "))


if __name__ == "__main__":
    sys.exit(main())
