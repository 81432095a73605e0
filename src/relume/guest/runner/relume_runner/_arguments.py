"""A request's JSON body as the arguments of a function.

The names must fit the signature; the values go in as JSON gives them. Only parameters whose annotation has a
pydantic model in it are validated and converted, as that is what such an annotation asks for.
"""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


class BadArguments(Exception):
    """The body does not fit the function. ``problems`` has one line for each misfit; ``status`` is 400 for
    what is no JSON object, 422 for one that does not fit."""

    def __init__(self, status: int, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.problems = problems or []


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``; an empty body is an empty object. Raises BadArguments."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadArguments(400, f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadArguments(
            400, f"the body must be a JSON object with the arguments by name, not {type(value).__name__}"
        )
    return value


class Parameters:
    """What a function takes, worked out once."""

    def __init__(self, function: Function) -> None:
        self._name = function.__name__
        self._parameters = list(inspect.signature(function).parameters.values())
        kinds = {parameter.kind for parameter in self._parameters}
        self._takes_any = inspect.Parameter.VAR_KEYWORD in kinds
        self._named = {
            parameter.name: parameter
            for parameter in self._parameters
            if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        }
        hints = _hints(function)
        self._converters = {
            name: converter for name in self._named if (converter := _converter(hints.get(name))) is not None
        }

    def __str__(self) -> str:
        return "(" + ", ".join(str(parameter) for parameter in self._parameters) + ")"

    def bind(self, body: dict[str, Any], run_id: str) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments for a call. Raises BadArguments.

        A parameter named ``run_id`` gets the run's id unless the body has one, as on Cerebrium.
        """
        given = dict(body)
        if "run_id" in self._named:
            given.setdefault("run_id", run_id)
        problems = [
            f"unknown argument: {name}" for name in given if name not in self._named and not self._takes_any
        ]
        problems += [
            f"missing argument: {name}"
            for name, parameter in self._named.items()
            if parameter.default is inspect.Parameter.empty and name not in given
        ]
        for name, convert in self._converters.items():
            if name in given:
                try:
                    given[name] = convert(given[name])
                except ValueError as error:
                    problems += _validation_problems(name, error)
        if problems:
            raise BadArguments(422, f"the body does not fit {self._name}{self}", problems)
        positional = [
            given.pop(name)
            for name, parameter in self._named.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and name in given
        ]
        return positional, given


def _hints(function: Function) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:
        # An annotation that cannot be resolved (a name under TYPE_CHECKING) asks for nothing at run time.
        return {}


def _converter(annotation: Any) -> Callable[[Any], Any] | None:
    """How to make a value of ``annotation``, when there is a pydantic model in it."""
    pydantic: Any = sys.modules.get("pydantic")
    if annotation is None or pydantic is None or not _mentions(annotation, pydantic.BaseModel):
        return None
    if hasattr(pydantic, "TypeAdapter"):
        validate: Callable[[Any], Any] = pydantic.TypeAdapter(annotation).validate_python
        return validate
    return lambda value: pydantic.parse_obj_as(annotation, value)  # pydantic 1


def _mentions(annotation: Any, model: type) -> bool:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return issubclass(annotation, model)
    return any(_mentions(part, model) for part in typing.get_args(annotation))


def _validation_problems(name: str, error: ValueError) -> list[str]:
    """A line for each error of a pydantic ValidationError (which is a ValueError in both its versions)."""
    errors: Any = getattr(error, "errors", None)
    if errors is None:
        return [f"{name}: {error}"]
    return [f"{'.'.join(str(part) for part in (name, *each['loc']))}: {each['msg']}" for each in errors()]
