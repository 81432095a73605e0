"""Import the app's file and find the functions it offers.

A function is offered when it is defined in that file and its name has no leading underscore. What the file
merely imports is not, nor are classes and other callables.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

Function = Callable[..., Any]


class LoadFailed(Exception):
    """The app's file cannot be served. The message is for its author: what, where, with the traceback."""


class Stopped(SystemExit):
    """Somebody ended this process while it was importing the app: no failure of the app's."""


def load(file: Path) -> dict[str, Function]:
    """Import ``file`` as a module of its stem's name; the functions it offers, by name. Raises LoadFailed.

    The module is a real one in ``sys.modules``, importable by child processes: pickled functions and
    multiprocessing's spawn find it.
    """
    path = file.resolve()
    if not path.is_file():
        raise LoadFailed(
            f"{path} does not exist; an app without an entrypoint in cerebrium.toml needs a {file.name} "
            "with functions"
        )
    module = _import(path)
    functions: dict[str, Function] = {
        name: member
        for name, member in vars(module).items()
        if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith("_")
    }
    if not functions:
        raise LoadFailed(f"{path} defines no public function, so there is nothing to call")
    return functions


def _import(path: Path) -> ModuleType:
    name = path.stem
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadFailed(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Stopped:
        raise
    except SystemExit as error:
        raise LoadFailed(f"{path} ended the process while it was imported (exit {error.code})") from error
    except Exception as error:
        frames = _from_file(error.__traceback__, path)
        report = "".join(traceback.format_exception(type(error), error, frames))
        raise LoadFailed(f"{path} failed while it was imported\n{report.rstrip()}") from error
    return module


def _from_file(frames: TracebackType | None, path: Path) -> TracebackType | None:
    """The traceback from the app's first line on, without ours and the import system's. A syntax error has
    none of the app's: then it is empty, and the error itself says the line."""
    while frames is not None and frames.tb_frame.f_code.co_filename != str(path):
        frames = frames.tb_next
    return frames
