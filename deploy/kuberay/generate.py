"""Write the Kubernetes files from cluster.yaml, deploy/ray.env and serve_apps/classifier.yaml.

    python deploy/kuberay/generate.py --image REGISTRY/rayloop:0.1.0
    python deploy/kuberay/generate.py --redis rediss://HOST:6379 --redis-secret rayloop-redis

raycluster.yaml is a cluster to submit jobs to, rayjob.yaml the pipeline on a cluster of its own,
and rayservice.yaml the served model. Pools, their sizes, labels and machines, the variables, the
bucket and the MLflow server are those of the files above: change them there. For KubeRay 1.7 or
newer (the priority of a pool) on EKS; elsewhere the label that tells spot nodes (`pod`) has
another name.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from rayloop.growth import NODE_TYPES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

RAY_VERSION = "2.60.0"
GIB_OF = {"m7i.xlarge": 16, "m7i.2xlarge": 32, "g6.2xlarge": 32}
"""Memory of each machine type in cluster.yaml."""

CPUS_OF_HEAD = 4
KEPT_CPUS = 1
"""What a machine keeps for Kubernetes. A pod fills the rest, so that no two share a machine and
each finds the CPUs that cluster.yaml promises, less one."""

SEEN_SHARE = 0.925
"""Share of a machine's memory that its system finds (Karpenter's VM_MEMORY_OVERHEAD_PERCENT)."""

KUBELET_MIB = 255 + 11 * 58 + 100
"""EKS keeps 255 MiB and 11 for each of the 58 pods that machines of these sizes may have, and turns
pods out when 100 are left."""

DAEMONS_MIB = 512
"""For the pods that every node has: network, proxy, NVIDIA's device plugin."""

AUTOSCALER_MIB = 1024
"""Most that the autoscaler, in the head's pod, may take."""

DRAIN_S = 60
"""How long a leaving pod waits for its requests: twice what a replica waits for its HAProxies to
hear of it (RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S). Ray's 30 s would cut that off."""

GRACE_S = DRAIN_S + 30
"""Kubernetes ends the pod by force then; Ray needs some seconds to stop after the drain."""

SPOT_PATIENCE_S = 600
"""A pod of the spot pool that found no machine is given up then, and gpu-worker is asked instead.
Ray's default is an hour; a machine takes 2 minutes to come and the image 3 to load."""

JOB_RETRIES = 3
"""New clusters for a job that failed; each continues the run of the same name."""

KEEP_FINISHED_S = 600
"""How long a finished job's cluster stays, for a look at its logs."""

HEADER = "# Written by deploy/kuberay/generate.py; change what it reads, not this file.\n"


def main() -> None:
    """Write the files beside this one, or into --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", default="rayloop:0.1.0", help="image of deploy/Dockerfile")
    parser.add_argument("--redis", default="", help="address of a Redis that outlives the head")
    parser.add_argument(
        "--redis-secret", default="", help="secret with its password, key `password`"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    args = parser.parse_args()
    for name, manifest in manifests(args.image, args.redis, args.redis_secret).items():
        text = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)
        (args.out / name).write_text(HEADER + text)


def manifests(image: str, redis: str = "", redis_secret: str = "") -> dict[str, dict[str, Any]]:
    """The manifest of each file.

    Args:
        image: Image with rayloop, see deploy/Dockerfile.
        redis: Address of an external Redis; empty means the cluster's state dies with its head.
        redis_secret: Secret that holds its password; empty means it asks for none.
    """
    serve_config = (ROOT / "serve_apps" / "classifier.yaml").read_text()
    app = yaml.safe_load(serve_config)["applications"][0]["args"]
    cluster = cluster_spec(image, redis, redis_secret)
    return {
        "raycluster.yaml": _manifest("RayCluster", "rayloop", cluster),
        "rayjob.yaml": _manifest("RayJob", "rayloop-pipeline", job_spec(cluster, app)),
        "rayservice.yaml": _manifest("RayService", "rayloop-classifier", {
            # A new cluster takes over when it is ready; a failed request would be no upgrade.
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": GRACE_S,
            "excludeHeadPodFromServeSvc": True,
            "serveConfigV2": "".join(
                line for line in serve_config.splitlines(keepends=True) if not line.startswith("#")
            ).lstrip(),
            "rayClusterConfig": cluster,
        }),
    }  # fmt: skip


def job_spec(cluster: dict[str, Any], app: dict[str, Any]) -> dict[str, Any]:
    """The pipeline on a cluster of its own, which continues after a failure of the cluster.

    Args:
        cluster: The cluster.
        app: Where the served application looks for the model that the pipeline makes.
    """
    run_id = "pipeline-1"
    return {
        # One CPU a worker fits the pods that are always there. The service comes after the job; the
        # pipeline's own serving listens on 127.0.0.1, where replicas of other pods are not reached.
        "entrypoint": f"python /opt/rayloop/jobs/pipeline.py cluster --run-id {run_id} "
        "--train.cpus-per-worker 1 --pipeline.no-serve "
        f"--registry.tracking-uri {app['tracking_uri']}",
        "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAYLOOP_HOME": app["home"]}}),
        "submissionMode": "K8sJobMode",
        "backoffLimit": JOB_RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_FINISHED_S,
        "rayClusterSpec": cluster,
    }


def cluster_spec(image: str, redis: str, redis_secret: str) -> dict[str, Any]:
    """The cluster that all three use.

    Args:
        image: Image with rayloop.
        redis: Address of an external Redis, or nothing.
        redis_secret: Secret that holds its password, or nothing.
    """
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    pools = dict(cluster["available_node_types"])
    head = pools.pop(cluster["head_node_type"])
    variables = environment()
    # A job's driver runs on the head, and must know what the autoscaler may still add.
    of_head = {**variables, NODE_TYPES: json.dumps([node_type(pool) for pool in pools.values()])}
    spec: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        # The operator makes the token, one secret for each cluster, and sets RAY_AUTH_MODE.
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": 60 * cluster["idle_timeout_minutes"],
            "env": [
                _variable(
                    "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S", str(SPOT_PATIENCE_S)
                )
            ],
            # Out of what the head's machine keeps for Kubernetes.
            "resources": {
                "requests": {"cpu": "500m", "memory": f"{AUTOSCALER_MIB // 2}Mi"},
                "limits": {"cpu": "500m", "memory": f"{AUTOSCALER_MIB}Mi"},
            },
        },
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {
                "num-cpus": str(head["resources"]["CPU"]),
                "num-gpus": str(head["resources"]["GPU"]),
                # Reached through the service inside the cluster only, and with the token.
                "dashboard-host": "0.0.0.0",
                "object-spilling-directory": "/var/tmp/ray-spill",
            },
            "labels": head["labels"],
            "template": pod(head, image, of_head, CPUS_OF_HEAD, AUTOSCALER_MIB),
        },
        "workerGroupSpecs": [group(name, pool, image, variables) for name, pool in pools.items()],
    }
    if redis:
        spec["gcsFaultToleranceOptions"] = {"redisAddress": redis}
        if redis_secret:
            key = {"secretKeyRef": {"name": redis_secret, "key": "password"}}
            spec["gcsFaultToleranceOptions"]["redisPassword"] = {"valueFrom": key}
    return spec


def group(name: str, pool: dict[str, Any], image: str, variables: dict[str, str]) -> dict[str, Any]:
    """One pool of workers.

    Args:
        name: Its name in cluster.yaml.
        pool: Its settings there.
        image: Image with rayloop.
        variables: Environment of the pods.
    """
    return {
        "groupName": name.replace("_", "-"),  # part of the pods' names
        "replicas": pool["min_workers"],
        "minReplicas": pool["min_workers"],
        "maxReplicas": pool["max_workers"],
        "idleTimeoutSeconds": pool["idle_timeout_s"],
        "priority": pool.get("priority", 0),
        "labels": pool["labels"],
        "rayStartParams": {"object-spilling-directory": "/var/tmp/ray-spill"},
        "template": pod(pool, image, variables, pool["resources"]["CPU"]),
    }


def node_type(pool: dict[str, Any]) -> dict[str, int]:
    """What a pod of a pool gives to work, and how many there may be, for `rayloop.growth`.

    Args:
        pool: Settings of the pool in cluster.yaml.
    """
    offered = pool["resources"]
    return {
        "CPU": offered["CPU"] - KEPT_CPUS,
        "GPU": offered["GPU"],
        "max": pool["max_workers"],
    }


def room_mib(machine: str) -> int:
    """Memory for pods on a machine, in MiB.

    Args:
        machine: Its EC2 type.

    Raises:
        SystemExit: Its memory is not known here.
    """
    if machine not in GIB_OF:
        raise SystemExit(
            f"The memory of {machine!r}, from cluster.yaml, is not known; add it to GIB_OF in "
            f"{Path(__file__).name}."
        )
    return int(1024 * GIB_OF[machine] * SEEN_SHARE) - KUBELET_MIB


def pod(
    pool: dict[str, Any], image: str, variables: dict[str, str], cpus: int, beside_mib: int = 0
) -> dict[str, Any]:
    """The pod of one machine.

    Args:
        pool: Settings of the pool in cluster.yaml.
        image: Image with rayloop.
        variables: Its environment.
        cpus: CPUs of the machine.
        beside_mib: Memory of the other container of the pod.

    Raises:
        SystemExit: The memory of the machine type is not known here.
    """
    machine = pool["node_config"]["InstanceType"]
    memory = (room_mib(machine) - DAEMONS_MIB - beside_mib) // 1024
    resources = {"cpu": str(cpus - KEPT_CPUS), "memory": f"{memory}Gi"}
    gpus = pool["resources"]["GPU"]
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    spot = pool["labels"]["ray.io/market-type"] == "spot"
    spec: dict[str, Any] = {
        "restartPolicy": "Never",  # the autoscaler makes a new pod in the place of a dead one
        "terminationGracePeriodSeconds": GRACE_S,
        "nodeSelector": {
            "node.kubernetes.io/instance-type": machine,
            "eks.amazonaws.com/capacityType": "SPOT" if spot else "ON_DEMAND",
        },
        "containers": [
            {
                "name": "ray",
                "image": image,
                "env": [_variable(key, value) for key, value in variables.items()],
                # The bucket's key (AWS_ACCESS_KEY_ID ...), where the nodes' role does not open it.
                "envFrom": [{"secretRef": {"name": "rayloop-storage", "optional": True}}],
                # Equal, so that the pod is the last that its machine would turn out.
                "resources": {"requests": dict(resources), "limits": dict(resources)},
                "volumeMounts": [{"name": "spill", "mountPath": "/var/tmp/ray-spill"}],
            }
        ],
        "volumes": [{"name": "spill", "emptyDir": {}}],
        "securityContext": {"runAsUser": 1000, "fsGroup": 1000},
    }
    if gpus:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    return {"spec": spec}


def environment() -> dict[str, str]:
    """The variables of deploy/ray.env; the operator sets those of the token itself."""
    variables = {}
    for line in (ROOT / "deploy" / "ray.env").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            variables[name] = shlex.split(value)[0]
    del variables["RAY_AUTH_MODE"]
    return {**variables, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}


def _manifest(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _variable(name: str, value: str) -> dict[str, str]:
    return {"name": name, "value": value}


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, and everything written out: kubectl's readers know no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)

if __name__ == "__main__":
    main()
