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

from ._errors import AppError
from ._log import log

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
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        self._converters = {
            name: converter
            for name, parameter in self._named.items()
            if (converter := self._converter(parameter, scope)) is not None
        }
        self._shown = "(" + ", ".join(map(_shown, self._parameters)) + ")"

    def __str__(self) -> str:
        """The signature, for anybody to read: of default values only those that can hold no secret."""
        return self._shown

    def _converter(self, parameter: inspect.Parameter, scope: dict[str, Any]) -> Callable[[Any], Any] | None:
        try:
            return _converter(_resolved(parameter.annotation, scope))
        except Exception as error:
            log.warning(
                "%s: values of %s are passed on as JSON gives them, as its annotation cannot be validated: "
                "%s: %s",
                *(self._name, parameter.name, type(error).__name__, str(error).partition("\n")[0]),
            )
            return None

    def bind(self, body: dict[str, Any], run_id: str) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments for a call. Raises BadArguments, and AppError where a validator of
        the app's raised what is no ValueError.

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
                except BaseException as error:
                    raise AppError from error
        if problems:
            raise BadArguments(422, f"the body does not fit {self._name}{self}", problems)
        positional = [
            given.pop(name, parameter.default)  # each has its place, also one behind which another is given
            for name, parameter in self._named.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        ]
        return positional, given


class _Hidden:
    def __repr__(self) -> str:
        return "..."


def _shown(parameter: inspect.Parameter) -> str:
    """``n: int = 1``, with ``...`` for a default that may be a key, a model, or have a repr that raises."""
    default = parameter.default
    if default is not inspect.Parameter.empty and type(default) not in (type(None), bool, int, float):
        parameter = parameter.replace(default=_Hidden())
    try:
        return str(parameter)
    except Exception:  # of the repr of something in the annotation
        return parameter.name


def _resolved(annotation: Any, scope: dict[str, Any]) -> Any:
    """The annotation with the names in it looked up; None where there is one that cannot be found (under
    TYPE_CHECKING): such an annotation asks for nothing at run time."""

    def holder() -> None: ...

    holder.__annotations__ = {"parameter": annotation}
    try:
        return typing.get_type_hints(holder, scope)["parameter"]
    except Exception:
        return None


def _converter(annotation: Any) -> Callable[[Any], Any] | None:
    """How to make a value of ``annotation``, when there is a pydantic model in it."""
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is None or not _mentions(annotation, pydantic.BaseModel):
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
