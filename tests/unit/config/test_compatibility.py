"""docs/compatibility.md and the models say the same, and both know every published key."""

from __future__ import annotations

from pathlib import Path

import pytest

from relume.config import compatibility
from relume.config.app import AppFile, PartnerRuntime
from relume.config.keys import Table, allowed, key_of, leaves
from relume.config.node import NodeFile

DOCS = Path(__file__).parents[3] / "docs"

PUBLISHED = {
    "cerebrium.deployment": "name python_version disable_auth include exclude shell_commands pre_build_commands "
    "docker_base_image_url use_uv deployment_initialization_timeout",
    "cerebrium.runtime": "container_runtime",
    "cerebrium.runtime.custom": "entrypoint port healthcheck_endpoint readycheck_endpoint dockerfile_path",
    "cerebrium.hardware": "cpu memory compute gpu_count provider region",
    "cerebrium.scaling": "min_replicas max_replicas replica_concurrency scaling_metric scaling_target "
    "scaling_buffer cooldown response_grace_period evaluation_interval_seconds load_balancing_algorithm "
    "compute_tier roll_out_duration_seconds",
    "cerebrium.dependencies": "pip apt conda",
    "cerebrium.dependencies.paths": "pip apt conda",
    "cerebrium.experimental": "checkpointing",
}
"""The vendor's reference and CLI source, August 2026; written down a second time on purpose."""


def test_the_page_is_what_the_models_say() -> None:
    assert (DOCS / "compatibility.md").read_text() == compatibility.table(), (
        "run: python -m relume.config.compatibility > docs/compatibility.md"
    )


def test_every_published_key_is_known() -> None:
    known = {path for path, _ in leaves(AppFile)}
    published = {(*table.split("."), key) for table, keys in PUBLISHED.items() for key in keys.split()}
    assert {path for path in known if path[0] == "cerebrium"} == published
    assert set(PartnerRuntime.model_fields) == {"port", "model_name", "language", "image_version"}


@pytest.mark.parametrize("model", [AppFile, PartnerRuntime, NodeFile])
def test_every_key_says_what_relume_does_with_it(model: type[Table]) -> None:
    page = (DOCS / "compatibility.md").read_text()
    for path, field in leaves(model):
        assert key_of(field).note
        assert allowed(field)
        assert f"| `{path[-1]}` |" in page
