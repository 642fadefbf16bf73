"""What an autoscaler was told -> the nodes a cluster could still get, beside those it has.

Ray's own interface tells only of nodes that are there, and a GPU pool that costs nothing while it
is idle has none.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rayloop.errors import ConfigError

NODE_TYPES = "RAYLOOP_NODE_TYPES"
"""Variable of the head with a JSON list of node types, `{"CPU": 8, "GPU": 0, "max": 4}` each, where
no launcher has left its file (on Kubernetes)."""

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where Ray's cluster launcher leaves on the head what it hands to the autoscaler."""

MOST_NODES = 10_000


def nodes_to_come(
    gpus_first: bool,
    environment: Mapping[str, str] = os.environ,
    bootstrap: str = BOOTSTRAP,
) -> list[tuple[float, float]]:
    """CPUs and GPUs of every worker node the autoscaler may run at once; empty without one.

    Nodes that run already are among them.

    Args:
        gpus_first: What is wanted, where the cluster's own limit does not hold all its pools.
        environment: Of this process, which runs on the head.
        bootstrap: The launcher's file.

    Raises:
        ConfigError: The variable is not as it must be.
    """
    told = environment.get(NODE_TYPES, "")
    file = Path(bootstrap).expanduser()
    if told:
        return _expanded(_from_variable(told), MOST_NODES, gpus_first)
    if not file.is_file() or "RAY_ADDRESS" not in environment:
        return []
    config = yaml.safe_load(file.read_text())
    kinds = [
        (*_size(kind.get("resources") or {}), int(kind.get("max_workers", 0)))
        for name, kind in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    ]
    return _expanded(kinds, int(config.get("max_workers", MOST_NODES)), gpus_first)


def _from_variable(told: str) -> list[tuple[float, float, int]]:
    try:
        return [(*_size(kind), int(kind["max"])) for kind in json.loads(told)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{NODE_TYPES}={told} is not a JSON list of node types ({error!r}); write "
            '[{"CPU": 8, "GPU": 0, "max": 4}], or leave it out where nothing scales.'
        ) from None


def _size(resources: Mapping[str, Any]) -> tuple[float, float]:
    return float(resources.get("CPU", 0)), float(resources.get("GPU", 0))


def _expanded(
    kinds: list[tuple[float, float, int]], most: int, gpus_first: bool
) -> list[tuple[float, float]]:
    """One pair a node, at most so many, the largest in what is wanted first."""
    nodes = [(cpus, gpus) for cpus, gpus, count in kinds for _ in range(min(count, most))]
    order = (1, 0) if gpus_first else (0, 1)
    return sorted(nodes, key=lambda node: [-node[kind] for kind in order])[:most]
