"""A build on its way to another node: what is known of it as JSON, and that taken apart again with suspicion.

The app's configuration does not travel (the node that adopts a build has its own), nor does any place on a disk.
The stages do: which inputs gave which layer, so that the next build there begins from the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relume.build import plan as plans
from relume.build.depot import Made
from relume.build.model import Build, Layer
from relume.build.plan import Plan
from relume.config import AppConfig
from relume.errors import Untrusted

_FIELDS = (
    "build_id",
    "argv",
    "env",
    "cwd",
    "user",
    "port",
    "checkpointing",
    "base",
    "resolved",
    "created_at",
)
_WORD = re.compile(r"[a-z]{1,20}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MADE_ANEW = 1000
"""How often the same inputs may have given the same layers (``plan.build_id``)."""


def facts_of(build: Build, stages: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What another node needs besides the layers; ``stages`` as ``Depot.stages_of`` gives them."""
    whole = build.as_dict()
    return {name: whole[name] for name in _FIELDS} | {"stages": list(stages)}


def build_of(
    facts: Mapping[str, Any], digests: Sequence[str], plan: Plan, config: AppConfig, layers_directory: Path
) -> Build:
    """The inverse. Raises Untrusted unless it is a build of ``plan`` on layers of these digests."""
    try:
        build = Build(
            build_id=_text(facts["build_id"]),
            app=plan.app,
            inputs_digest=plan.inputs_digest,
            layers=tuple(Layer(digest, layers_directory / digest) for digest in digests),
            argv=tuple(_text(word) for word in facts["argv"]),
            env={_text(name): _text(value) for name, value in facts["env"].items()},
            cwd=_text(facts["cwd"]),
            user=_text(facts["user"]),
            port=int(facts["port"]),
            checkpointing=bool(facts["checkpointing"]),
            config=plans.snapshot(config),
            base=_text(facts["base"]),
            resolved=dict(facts["resolved"]),
            created_at=float(facts["created_at"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Untrusted(f"the build of {plan.app} cannot be read: {error!r}") from None
    if (build.port, build.checkpointing) != (plan.port, plan.checkpointing) or not build.argv:
        raise Untrusted(f"build {build.build_id} is not what {plan.app} asks for")
    if not re.fullmatch(r"\d{1,10}:\d{1,10}", build.user) or not build.cwd.startswith("/"):
        raise Untrusted(f"build {build.build_id} runs as {build.user!r} in {build.cwd!r}")
    ids = (plans.build_id(build.inputs_digest, digests, number) for number in range(_MADE_ANEW))
    if not all(map(_DIGEST.fullmatch, digests)) or build.build_id not in ids:
        raise Untrusted(f"build {build.build_id} is not a build on its layers")
    return build


def stages_of(facts: Mapping[str, Any], build: Build) -> list[tuple[str, str, Made]]:
    """(kind, key, what it gave) of the stages that came along. Raises Untrusted."""
    layers = {layer.digest: layer for layer in build.layers}
    try:
        return [
            (
                _like(_WORD, stage["kind"]),
                _like(_DIGEST, stage["key"]),
                Made(layers[stage["layer"]], dict(stage["facts"])),
            )
            for stage in facts["stages"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise Untrusted(f"the stages of build {build.build_id} cannot be read: {error!r}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r} is no text")
    return value


def _like(pattern: re.Pattern[str], value: Any) -> str:
    if not pattern.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is no name")
    return str(value)
