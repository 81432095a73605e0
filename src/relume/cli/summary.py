"""A configuration in the groups that the vendor's deploy shows before it asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from relume.config import AppConfig

_MANY = 6


def summary(config: AppConfig) -> dict[str, dict[str, str]]:
    """Group -> setting -> value, for people. Groups without a setting are left out."""
    hardware, deployment, scaling = config.hardware, config.deployment, config.scaling
    groups = {
        "HARDWARE": {
            "Compute": ", ".join(hardware.compute)
            + (f" x {hardware.accelerators}" if hardware.accelerators else ""),
            "CPU": f"{hardware.cpu:g}",
            "Memory": f"{hardware.memory:g} GB",
        },
        "DEPLOYMENT": {
            "Name": config.name,
            "Python": deployment.python_version,
            "Base": deployment.docker_base_image_url,
            **_runtime(config),
            "Include": _listed(deployment.include),
            "Exclude": _listed(deployment.exclude),
            "Checkpointing": "on" if config.checkpointing else "off",
        },
        "SCALING": {"Replicas": f"{scaling.min_replicas} to {scaling.max_replicas} (not acted on)"},
        "DEPENDENCIES": _dependencies(config),
    }
    return {group: settings for group, settings in groups.items() if settings}


def _runtime(config: AppConfig) -> dict[str, str]:
    custom = config.runtime.custom
    if partner := config.runtime.partner:
        return {"Runtime": f"{partner} (a partner's service)"}
    if custom is None:
        return {"Runtime": "functions of main.py"}
    found = {"Dockerfile": custom.dockerfile_path or "", "Entrypoint": " ".join(custom.entrypoint or ())}
    ready = f"GET {custom.readycheck_endpoint}" if custom.readycheck_endpoint else "the port accepts"
    return {
        **{name: value for name, value in found.items() if value},
        "Port": str(custom.port),
        "Ready when": ready,
    }


def _dependencies(config: AppConfig) -> dict[str, str]:
    found = {}
    for tool in ("pip", "apt", "conda"):
        packages = getattr(config.dependencies, tool)
        path = getattr(config.dependencies.paths, tool)
        named = [
            name if version in ("", "latest") else f"{name} {version}" for name, version in packages.items()
        ]
        if text := ", ".join(part for part in (_listed(tuple(named)) if named else "", path or "") if part):
            found[tool] = text
    return found


def _listed(items: tuple[str, ...]) -> str:
    more = f" and {len(items) - _MANY} more" if len(items) > _MANY else ""
    return (", ".join(items[:_MANY]) + more) or "-"
