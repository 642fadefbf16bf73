"""cluster.yaml is what Ray's autoscaler accepts, and starts Ray with the switches a job sets."""

import json
from pathlib import Path

import jsonschema
import ray
import yaml

from rayloop.cluster import TRAIN_ENVIRONMENT

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_file_keeps_rays_schema():
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(CLUSTER, json.loads(schema.read_text()))
    assert CLUSTER["head_node_type"] in CLUSTER["available_node_types"]


def test_cluster_file_sets_the_poll_interval_before_ray_starts():
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert f"{name}={TRAIN_ENVIRONMENT[name]}" in " ".join(CLUSTER[key])
