"""deploy/kuberay holds what KubeRay takes, written from the settings that cluster.yaml has."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.scripts import scripts
from ray.serve.schema import ServeDeploySchema

from deploy.kuberay import generate
from rayloop.growth import nodes_to_come
from rayloop.presets import parse_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
NAMES = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
SCHEMA = json.loads((ROOT / "tests" / "kuberay_schema.json").read_text())
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
POOLS = CLUSTER["available_node_types"]
APP = yaml.safe_load((ROOT / "serve_apps" / "classifier.yaml").read_text())


def manifest(name):
    return yaml.safe_load((FOLDER / name).read_text())


def cluster_of(name):
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


VALIDATORS = {
    kind: jsonschema.Draft7Validator(
        {**SCHEMA["definitions"][kind], "definitions": SCHEMA["definitions"]}
    )
    for kind in ("RayCluster", "RayJob", "RayService")
}
"""One for each kind, so that a refusal names the field."""


def check(document):
    for error in VALIDATORS[document["kind"]].iter_errors(document):
        raise error


@pytest.fixture
def spec():
    return cluster_of("raycluster.yaml")


def test_the_files_are_what_the_settings_give(tmp_path):
    command = [sys.executable, FOLDER / "generate.py", "--out", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), (
            f"{name} is not what cluster.yaml, deploy/ray.env and serve_apps/classifier.yaml give; "
            "run python deploy/kuberay/generate.py"
        )


@pytest.mark.parametrize("name", NAMES)
def test_kuberay_takes_the_files(name):
    check(manifest(name))


def test_kuberay_takes_them_with_a_redis_too():
    made = generate.manifests("there/rayloop:1", "rediss://redis:6379", "rayloop-redis")
    for document in made.values():
        check(document)
    options = made["raycluster.yaml"]["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "rediss://redis:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "rayloop-redis"
    assert "there/rayloop:1" in json.dumps(made)


def places(part, way=()):
    """Every object in a manifest, by the way to it."""
    if isinstance(part, dict):
        yield way
        for key, value in part.items():
            yield from places(value, (*way, key))
    elif isinstance(part, list) and part:
        yield from places(part[0], (*way, 0))


FREE = ("rayStartParams", "labels", "nodeSelector", "requests", "limits")
"""Maps whose keys the user chooses."""


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_kuberay_does_not_know_is_refused_everywhere(name):
    ways = [way for way in places(manifest(name)) if not way or way[-1] not in FREE]
    assert len(ways) > 20
    for way in ways:
        document = manifest(name)
        part = document
        for step in way:
            part = part[step]
        part["replica"] = 1
        with pytest.raises(jsonschema.ValidationError):
            check(document)


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (("authOptions", "mode"), "Token"),
        (("autoscalerOptions", "version"), "v3"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("headGroupSpec", "serviceType"), "Public"),
        (("workerGroupSpecs", 0, "minReplicas"), "2"),
        (("workerGroupSpecs", 0, "groupName"), "cpu_worker"),
        (("workerGroupSpecs", 0, "labels", "ray.io/market-type"), "on demand"),
        (("workerGroupSpecs", 0, "template", "spec", "restartPolicy"), "never"),
    ],
)
def test_a_wrong_value_is_refused(way, value):
    document = manifest("raycluster.yaml")
    part = document["spec"]
    for step in way[:-1]:
        part = part[step]
    part[way[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


# --- the cluster


def test_every_file_has_the_same_cluster(spec):
    assert cluster_of("rayjob.yaml") == cluster_of("rayservice.yaml") == spec
    assert spec["rayVersion"] == ray.__version__
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert f"ray=={spec['rayVersion']}" in lock


def test_rays_own_autoscaler_sees_the_pools_of_cluster_yaml():
    """Through the code that runs beside the head: its sizes, labels, limits and order."""
    config = _derive_autoscaling_config_from_ray_cr(
        {**manifest("raycluster.yaml"), "metadata": {"name": "rayloop", "namespace": "default"}}
    )
    types = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    assert types["headgroup"].resources["CPU"] == 0
    assert types["headgroup"].resources.get("GPU", 0) == 0
    for name, pool in POOLS.items():
        if name == CLUSTER["head_node_type"]:
            continue
        seen = types[name.replace("_", "-")]
        assert seen.resources["CPU"] == pool["resources"]["CPU"] - generate.KEPT_CPUS
        assert seen.resources.get("GPU", 0) == pool["resources"]["GPU"]
        assert (seen.min_worker_nodes, seen.max_worker_nodes) == (
            pool["min_workers"],
            pool["max_workers"],
        )
        assert seen.idle_timeout_s == pool["idle_timeout_s"]
        assert seen.labels == pool["labels"]
        assert seen.priority == pool.get("priority", 0)
    assert types["gpu-worker-spot"].priority > types["gpu-worker"].priority


def test_a_spot_pod_that_finds_no_machine_gives_way_to_on_demand(spec):
    """Ray's second autoscaler counts only pods it waited for in vain against their pool."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    failed = InstanceUpdateEvent(
        instance_id="1", instance_type="gpu-worker-spot",
        new_instance_status=Instance.ALLOCATION_FAILED,
    )  # fmt: skip
    monitor.notify([failed])
    assert monitor.get_recoverable_resource_availabilities() == {}
    failed.new_instance_status = Instance.ALLOCATION_TIMEOUT
    monitor.notify([failed])
    assert monitor.get_recoverable_resource_availabilities() == {"gpu-worker-spot": 0.0}
    variables = {item["name"]: item["value"] for item in spec["autoscalerOptions"]["env"]}
    name = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"
    code = (
        "from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig as C; "
        "print(C().allocate_status_timeout_s)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == variables[name] == str(generate.SPOT_PATIENCE_S)


def test_token_and_privacy(spec):
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]


def pods(spec):
    return [spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])]


def test_pods_have_the_variables_of_cluster_yaml_and_leave_without_losing_requests(spec):
    done = subprocess.run(
        ["bash", "-c", f"env -i bash -c 'set -a; . {ROOT}/deploy/ray.env; env -0'"],
        capture_output=True,
        text=True,
        check=True,
    )
    sourced = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    for name in ("RAY_AUTH_MODE", "PWD", "SHLVL", "_", "OLDPWD"):
        sourced.pop(name, None)
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(generate.DRAIN_S)}
    leaves = int(sourced["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    for template in pods(spec):
        container = template["spec"]["containers"][0]
        found = {item["name"]: item["value"] for item in container["env"]}
        found.pop("RAYLOOP_NODE_TYPES", None)
        assert found == {**sourced, **drain}
        assert leaves < generate.DRAIN_S < template["spec"]["terminationGracePeriodSeconds"]
        assert template["spec"]["restartPolicy"] == "Never"
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_head_alone_is_told_what_the_autoscaler_may_add(spec):
    head, *workers = ({item["name"]: item["value"] for item in t["spec"]["containers"][0]["env"]}
                      for t in pods(spec))  # fmt: skip
    assert not any("RAYLOOP_NODE_TYPES" in environment for environment in workers)
    offered = []
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        size = (float(limits["cpu"]), float(limits.get("nvidia.com/gpu", 0)))
        offered += [size] * group["maxReplicas"]
    assert sorted(nodes_to_come(True, head)) == sorted(offered)


def test_spot_pods_go_to_spot_machines_and_only_gpu_pods_to_gpu_machines(spec):
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        spot = group["groupName"] == "gpu-worker-spot"
        selector = pod["nodeSelector"]
        assert selector["eks.amazonaws.com/capacityType"] == ("SPOT" if spot else "ON_DEMAND")
        gpu = "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]
        assert gpu == group["groupName"].startswith("gpu") == ("tolerations" in pod)
        pool = POOLS[group["groupName"].replace("-", "_")]
        machine = pool["node_config"]["InstanceType"]
        assert selector["node.kubernetes.io/instance-type"] == machine


def test_start_parameters_are_flags_of_ray_start(spec):
    head = spec["headGroupSpec"]["rayStartParams"]
    groups = [group["rayStartParams"] for group in spec["workerGroupSpecs"]]
    for params, more in [(head, ["--head"]), *((params, []) for params in groups)]:
        words = [f"--{name}={value}" for name, value in params.items()]
        parsed = scripts.start.make_context("start", [*words, *more]).params
        assert parsed["object_spilling_directory"] == "/var/tmp/ray-spill"
    assert (head["num-cpus"], head["num-gpus"]) == ("0", "0")


def test_a_machine_of_unknown_size_is_said(monkeypatch):
    pool = {**POOLS["cpu_worker"], "node_config": {"InstanceType": "c9.huge"}}
    with pytest.raises(SystemExit, match=r"c9\.huge.*cluster\.yaml.*GIB_OF"):
        generate.pod(pool, "image", {}, 8)


def test_pods_fit_their_machines(spec):
    """Karpenter's page of instance types gives 14,162 Mi for 16 GiB with 58 pods (m5d.xlarge)."""
    assert generate.room_mib("m7i.xlarge") == 14_162
    head, *groups = pods(spec)
    beside = spec["autoscalerOptions"]["resources"]
    for template in (head, *groups):
        resources = template["spec"]["containers"][0]["resources"]
        machine = template["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"]
        for kind in ("requests", "limits"):
            mib = 1024 * int(resources[kind]["memory"].removesuffix("Gi"))
            if template is head:
                mib += int(beside[kind]["memory"].removesuffix("Mi"))
            room_mib = generate.room_mib(machine) - generate.DAEMONS_MIB
            assert room_mib / 2 < mib <= room_mib  # and no second one beside it


# --- the job and the service


def test_the_job_is_the_pipeline_and_a_new_try_continues_its_run():
    job = manifest("rayjob.yaml")["spec"]
    program, script, *words = shlex.split(job["entrypoint"])
    assert (program, script) == ("python", "/opt/rayloop/jobs/pipeline.py")
    config = parse_config("", words)
    assert config.run_id == "pipeline-1"  # the same at each try, in the same place
    assert job["backoffLimit"] == generate.JOB_RETRIES > 0
    served = APP["applications"][0]["args"]
    home = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]["RAYLOOP_HOME"]
    assert home == served["home"]
    assert home.startswith("s3://")
    assert config.registry.tracking_uri == served["tracking_uri"]
    assert config.registry.model == served["model"]
    cpus = sum(
        group["minReplicas"]
        * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in cluster_of("rayjob.yaml")["workerGroupSpecs"]
    )
    assert cpus >= config.train.num_workers * config.train.cpus_per_worker + 1
    assert config.train.cpus_per_worker and not config.pipeline.serve


def test_the_service_is_classifier_yaml():
    text = manifest("rayservice.yaml")["spec"]["serveConfigV2"]
    assert yaml.safe_load(text) == APP
    ServeDeploySchema.model_validate(yaml.safe_load(text))


# --- the image


def test_the_image_installs_the_lock_file_and_holds_what_jobs_and_replicas_import():
    lines = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    runs = [text for step, text in steps if step == "RUN"]
    assert any(text.startswith("make setup") for text in runs)
    assert not any("pip install" in text for text in runs)
    copied = {
        word.rstrip("/")
        for step, text in steps
        if step == "COPY"
        for word in text.split()[:-1]
        if not word.startswith("--")
    }
    mounted = {local for local in CLUSTER["file_mounts"].values() if not local.startswith("~")}
    assert copied == mounted
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    front = Path(generate.environment()["RAY_SERVE_HAPROXY_BINARY_PATH"]).parent
    assert f"python deploy/front.py {front}" in runs
    assert any("/etc/profile.d/" in text for text in runs)
    base = next(text for step, text in steps if step == "FROM")
    assert re.fullmatch(r"python:3\.12-slim-\w+", base)
    assert "wget" in " ".join(runs)  # KubeRay's probes
    assert [text for step, text in steps if step == "USER"][-1] == "ray"
