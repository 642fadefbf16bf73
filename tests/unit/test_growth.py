"""Nodes an autoscaler may add count for what fits; nothing else does."""

from pathlib import Path
from typing import Any

import pytest

from rayloop import cluster
from rayloop.errors import ConfigError, DoesNotFit
from rayloop.growth import nodes_to_come

BOOTSTRAP = """
max_workers: 5
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, max_workers: 0}
  cpu: {resources: {CPU: 8}, max_workers: 4}
  gpu: {resources: {CPU: 4, GPU: 1}, max_workers: 2}
"""
SUBMITTED = {"RAY_ADDRESS": "10.0.0.1:6379"}


def test_the_launchers_file_tells_of_all_pools_up_to_the_clusters_own_limit(tmp_path: Path) -> None:
    file = tmp_path / "bootstrap.yaml"
    file.write_text(BOOTSTRAP)
    assert nodes_to_come(True, SUBMITTED, str(file)) == [(4, 1), (4, 1), (8, 0), (8, 0), (8, 0)]
    assert nodes_to_come(False, SUBMITTED, str(file)) == [(8, 0)] * 4 + [(4, 1)]
    assert nodes_to_come(True, {}, str(file)) == []  # a Ray of this process alone
    assert nodes_to_come(True, SUBMITTED, str(tmp_path / "none")) == []


def test_the_variable_tells_where_there_is_no_file() -> None:
    told = '[{"CPU": 8, "max": 2}, {"CPU": 4, "GPU": 2, "max": 1}]'
    assert nodes_to_come(True, {"RAYLOOP_NODE_TYPES": told}) == [(4, 2), (8, 0), (8, 0)]
    for wrong in ("[", "{}x", '[{"CPU": 8}]', "[8]", '[{"max": "many"}]'):
        with pytest.raises(ConfigError, match="RAYLOOP_NODE_TYPES="):
            nodes_to_come(True, {"RAYLOOP_NODE_TYPES": wrong})


@pytest.fixture
def with_nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(now: list[tuple[float, float]], to_come: list[tuple[float, float]]) -> None:
        monkeypatch.setattr(cluster, "sizes_of_nodes", lambda: now)
        monkeypatch.setattr(cluster, "nodes_to_come", lambda _: to_come)

    return put


def test_what_fits_once_the_cluster_has_grown_is_let_through(with_nodes: Any) -> None:
    with_nodes([(0, 0)], [(8, 1)] * 4)
    assert cluster.check_room(4, 0, use_gpu=True) == 7
    assert cluster.check_room(4, 0, use_gpu=False) == 1  # and not all that may ever be there
    with pytest.raises(DoesNotFit, match=r"needs 8 GPUs; with all it may add, the cluster has 32"):
        cluster.check_room(8, 1, use_gpu=True)


def test_a_cluster_that_cannot_grow_refuses_at_once(with_nodes: Any) -> None:
    with_nodes([(8, 0)], [])
    with pytest.raises(DoesNotFit, match="needs 1 GPUs; the cluster has 8 CPUs and 0 GPUs"):
        cluster.check_room(1, 1, use_gpu=True)
