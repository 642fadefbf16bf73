"""cluster.yaml is what Ray's launcher takes, and what its commands do on a node is what we want.

The commands are run here, in a home of their own, with stand-ins for the programs that would
change a machine: what they would have done is written down and looked at.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private import commands, util
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeProviderAvailabilityTracker,
)
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.updater import NodeUpdater
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.scripts import scripts

from rayloop import haproxy
from rayloop.cli.local import JOB_STOP_WAIT_S
from rayloop.cluster import QUIET_ENVIRONMENT, TRAIN_ENVIRONMENT, TUNE_ENVIRONMENT
from rayloop.config import ServeConfig
from rayloop.growth import nodes_to_come
from rayloop.presets import cluster as cluster_preset
from tests.s3_server import PYTHON, set_up

ROOT = Path(__file__).parents[2]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
POOLS = CLUSTER["available_node_types"]
WORKERS = {name: pool for name, pool in POOLS.items() if name != CLUSTER["head_node_type"]}
SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def copy_of(config):
    return json.loads(json.dumps(config))


def with_(path, value):
    config = copy_of(CLUSTER)
    *way, last = path
    part = config
    for step in way:
        part = part[step]
    part[last] = value
    return config


# --- what the launcher accepts


def test_the_file_is_what_rays_launcher_takes(monkeypatch):
    """Its schema, and what its code asks for when the defaults of the provider are filled in."""
    jsonschema.validate(CLUSTER, SCHEMA)
    filled = util.prepare_config(copy_of(CLUSTER))
    util.validate_config(filled)
    assert set(filled["available_node_types"]) == set(POOLS)  # none of the launcher's own
    assert filled["docker"] == {}
    for pool in filled["available_node_types"].values():
        # Else the launcher puts an Ubuntu of 2018 in, and its keys into every machine.
        assert pool["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/")
        assert pool["node_config"]["IamInstanceProfile"]["Name"] in (
            "rayloop-head",
            "rayloop-worker",
        )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["idle_timeout_minute"], 5),
        (["available_node_types", "head", "resource"], {}),
        (["available_node_types", "cpu_worker", "min_workers"], "2"),
        (["available_node_types", "cpu_worker", "resources", "CPU"], 0.5),
        (["available_node_types", "gpu_worker", "labels", "ray.io/market-type"], 1),
        (["auth", "ssh_key"], "~/.ssh/id"),
        (["initialization_commands"], "apt-get update"),
    ],
)
def test_a_misspelled_or_mistyped_field_is_refused(path, value):
    with pytest.raises(jsonschema.ValidationError):
        util.validate_config(util.prepare_config(with_(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (["head_node_type"], "heads", "head_node_type"),
        (["max_workers"], 1, "min_workers"),
    ],
)
def test_what_the_schema_lets_through_the_launcher_refuses(path, value, why):
    with pytest.raises(ValueError, match=why):
        util.validate_config(util.prepare_config(with_(path, value)))


EC2 = """
import json, sys
import boto3
from botocore.validate import ParamValidator

client = boto3.client("ec2", region_name="x", aws_access_key_id="x", aws_secret_access_key="y")
shape = client.meta.service_model.operation_model("RunInstances").input_shape
for asked in json.load(sys.stdin):
    print(ParamValidator().validate(asked, shape).generate_report() or "fits")
"""


def test_ec2_knows_every_field_of_the_machines():
    """Looked up in the boto3 of the S3 server that tests start."""
    more = {"MinCount": 1, "MaxCount": 1, "KeyName": "key"}
    asked = [{**pool["node_config"], **more} for pool in POOLS.values()]
    asked.append({**asked[0], "MetadataOption": {}})
    set_up()
    done = subprocess.run(
        [PYTHON, "-c", EC2],
        input=json.dumps(asked), capture_output=True, text=True, check=True,
    )  # fmt: skip
    *fits, slip = done.stdout.splitlines()
    assert fits == ["fits"] * len(POOLS)
    assert "MetadataOption" in slip


# --- the pools


def test_the_head_offers_nothing_that_work_asks_for():
    head = POOLS[CLUSTER["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "max_workers" not in head  # the launcher's default for the head's type is none


def test_the_pools_are_cpu_on_demand_and_gpu_first_on_spot():
    spot, demand, cpu = WORKERS["gpu_worker_spot"], WORKERS["gpu_worker"], WORKERS["cpu_worker"]
    assert set(WORKERS) == {"cpu_worker", "gpu_worker_spot", "gpu_worker"}
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert spot["resources"] == demand["resources"]
    assert spot["node_config"]["InstanceType"] == demand["node_config"]["InstanceType"]
    assert spot["priority"] > demand["priority"]
    for pool in (demand, cpu, POOLS["head"]):
        assert "InstanceMarketOptions" not in pool["node_config"]
        assert pool["labels"]["ray.io/market-type"] == "on-demand"
    assert spot["labels"]["ray.io/market-type"] == "spot"
    for pool in WORKERS.values():
        assert pool["min_workers"] < pool["max_workers"]
        assert pool["idle_timeout_s"] <= 60 * CLUSTER["idle_timeout_minutes"]
    assert cpu["idle_timeout_s"] == 60 * CLUSTER["idle_timeout_minutes"]


def test_the_workers_that_are_always_there_hold_the_cluster_preset():
    """So that a job of it need not wait for machines."""
    config = cluster_preset()
    cpus = WORKERS["cpu_worker"]["min_workers"] * WORKERS["cpu_worker"]["resources"]["CPU"]
    assert cpus >= config.train.num_workers * max(1, config.train.cpus_per_worker) + 1
    most = WORKERS["cpu_worker"]["max_workers"] * WORKERS["cpu_worker"]["resources"]["CPU"]
    assert most >= config.serve.max_replicas * config.serve.cpus_per_replica


def test_the_file_that_the_launcher_leaves_on_the_head_tells_a_job_of_every_pool():
    """Written by the launcher's own code, which fills in and rewrites parts of cluster.yaml."""

    class Provider:
        def prepare_for_head_node(self, config):
            return config

    filled = util.prepare_config(copy_of(CLUSTER))
    with contextlib.ExitStack() as stack:
        _, file = commands._set_up_config_for_head_node(filled, Provider(), no_restart=False)
        stack.enter_context(file)
        found = nodes_to_come(True, {"RAY_ADDRESS": "10.0.0.1:6379"}, file.name)
    assert len(found) == CLUSTER["max_workers"]
    gpus = [size for size in found if size[1]]
    most = sum(WORKERS[name]["max_workers"] for name in ("gpu_worker", "gpu_worker_spot"))
    assert gpus == [(8.0, 1.0)] * most
    assert set(found) - set(gpus) == {(8.0, 0.0)}


def pool_for(demand, tracker):
    from deploy.spot import score

    def scorer(node_resources, resources, node_type):
        return score(
            node_resources, resources, node_type, node_availability_summary=tracker.summary()
        )

    to_add, left = get_nodes_for(POOLS, {}, "head", 10, demand, scorer)
    assert not left
    return dict(to_add)


def test_spot_comes_first_then_on_demand_while_ec2_has_no_spot_then_spot_again():
    now = [0.0]
    tracker = NodeProviderAvailabilityTracker(timer=lambda: now[0])
    train = [{"CPU": 4, "GPU": 1}] * 2
    assert pool_for(train, tracker) == {"gpu_worker_spot": 2}
    none_left = NodeLaunchException("InsufficientInstanceCapacity", "no spot", None)
    tracker.update_node_availability("gpu_worker_spot", 0, none_left)
    assert pool_for(train, tracker) == {"gpu_worker": 2}
    now[0] = 1801.0
    assert pool_for(train, tracker) == {"gpu_worker_spot": 2}


def test_work_without_a_gpu_gets_a_cpu_machine_even_if_none_could_be_started():
    tracker = NodeProviderAvailabilityTracker(timer=lambda: 0.0)
    assert pool_for([{"CPU": 8}], tracker) == {"cpu_worker": 1}
    tracker.update_node_availability("cpu_worker", 0, NodeLaunchException("x", "y", None))
    assert pool_for([{"CPU": 8}], tracker) == {"cpu_worker": 1}
    assert pool_for([{"CPU": 8}] * 9, tracker) == {"cpu_worker": 8, "gpu_worker_spot": 1}


def test_what_fits_no_machine_is_given_none():
    from deploy.spot import score

    summary = NodeProviderAvailabilityTracker().summary()
    resources = {"CPU": 8, "GPU": 1}
    assert score(resources, [{"GPU": 2}], "gpu_worker", node_availability_summary=summary) is None


# --- the environment


def ray_env():
    found = {}
    for line in (ROOT / "deploy" / "ray.env").read_text().splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            found[name] = shlex.split(value)[0]
    return found


def test_the_variables_are_those_that_rayloop_sets_on_a_laptop(monkeypatch):
    monkeypatch.setattr(haproxy, "available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    ours = {
        **QUIET_ENVIRONMENT,
        **TRAIN_ENVIRONMENT,
        **TUNE_ENVIRONMENT,
        **haproxy._throughput(),
    }
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_WAIT_S),
        "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.3",
        "RAY_local_fs_capacity_threshold": "0.9",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "30",
        "RAY_SERVE_HAPROXY_BINARY_PATH": f"/var/lib/rayloop/{haproxy.FRONT}",
    }
    assert ray_env() == {**ours, **own}


def test_what_classifier_yaml_asks_for_is_set():
    text = (ROOT / "serve_apps" / "classifier.yaml").read_text()
    asked = dict(re.findall(r"^#\s+(RAY_\w+)=(\S+)", text, re.MULTILINE))
    assert asked.items() <= ray_env().items()
    assert len(asked) == 3


def test_haproxys_limits_are_those_of_the_served_application(tmp_path):
    app = yaml.safe_load((ROOT / "serve_apps" / "classifier.yaml").read_text())
    args = app["applications"][0]["args"]
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "front.py", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / haproxy.FRONT)
    config = ServeConfig(max_batch_rows=args["max_batch_rows"])
    backend = (tmp_path / "backend").read_text()
    assert f"maxconn {haproxy.requests_at_once(config)}\n" in backend


# --- what the commands do


class Node:
    """A home with the files that the launcher copies there, and stand-ins on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.log.touch()
        for remote, local in CLUSTER["file_mounts"].items():
            target = self.home / remote.removeprefix("~/")
            target.parent.mkdir(parents=True, exist_ok=True)
            source = ROOT / local
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            elif not local.startswith("~"):
                shutil.copy(source, target)
        for name in ("sudo", "ray", "cloud-init", "mountpoint"):
            self.stand_in(self.bin / name)

    def stand_in(self, path: Path, more: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {path.name} "$@" >> {self.log}\n{more}\n')
        path.chmod(0o755)

    def run(self, command: str, **variables: object) -> str:
        """Run it as the launcher does, less the login shell, and give what was called."""
        from ray.autoscaler._private.command_runner import _with_environment_variables

        before = len(self.log.read_text())
        command = _with_environment_variables(command, variables)
        done = subprocess.run(
            ["bash", "-c", f"export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore && ({command})"],
            env={
                "HOME": str(self.home),
                "PATH": f"{self.bin}:/usr/sbin:/usr/bin:/sbin:/bin",
                "USER": "me",
            },
            cwd=self.home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.log.read_text()[before:]


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_set_up_is_make_setup_and_the_pinned_boto3(node):
    """With a python3 that only makes the folders of an environment, and a uv that writes down."""
    venv = node.home / "rayloop" / ".venv" / "bin"
    for name in ("made-python", "made-uv"):
        node.stand_in(node.bin / name)
    node.stand_in(
        node.bin / "python3",
        f'[ "$2" = venv ] && mkdir -p .venv/bin && cp {node.bin}/made-python .venv/bin/python '
        f"&& cp {node.bin}/made-uv .venv/bin/uv; exit 0",
    )
    calls = ""
    for command in [*CLUSTER["initialization_commands"], *CLUSTER["setup_commands"]]:
        calls += node.run(command)
    lock = (ROOT / "requirements.lock").read_text()
    uv = next(line for line in lock.splitlines() if line.startswith("uv=="))
    wanted = [
        f"made-python -m pip install --quiet --disable-pip-version-check {uv}",
        "made-uv pip sync --quiet --compile-bytecode --python .venv/bin/python requirements.lock",
        "made-uv pip install --quiet --python .venv/bin/python --no-deps --editable .",
    ]
    installs = [line for line in calls.splitlines() if " pip " in line and "--version" not in line]
    assert installs == wanted
    assert (node.home / "rayloop" / "requirements.lock").read_text() == lock
    assert "install -qy libstdc++6 make python3-venv rsync" in calls

    head = node.run(CLUSTER["head_setup_commands"][0])
    assert head == (
        "made-uv pip install --quiet --python .venv/bin/python --no-deps "
        "-r deploy/requirements-aws.lock\n"
    )
    again = "".join(node.run(command) for command in CLUSTER["setup_commands"])
    assert again == ""  # nothing to do
    bashrc = (node.home / ".bashrc").read_text()
    assert bashrc == "export RAY_AUTH_MODE=token PATH=$HOME/rayloop/.venv/bin:$PATH\n"
    assert venv.is_dir()


def test_the_lock_file_holds_what_the_package_needs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins: dict[str, list[Version]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        name, version = line.partition(";")[0].split("==")
        pins.setdefault(name.strip(), []).append(Version(version.strip()))
    for text in project["dependencies"]:
        wanted = Requirement(text)
        assert pins[wanted.name.lower()], text
        assert all(version in wanted.specifier for version in pins[wanted.name.lower()]), text
    # The Python that the images have, beside the one tested with.
    assert Requirement(f"python{project['requires-python']}").specifier.contains("3.12")
    assert str(pins["ray"][0]) == importlib.metadata.version("ray")


def test_boto3_is_pinned_with_all_that_is_not_in_the_lock_file():
    lines = (ROOT / "deploy" / "requirements-aws.lock").read_text().split()
    assert [line.split("==")[0] for line in lines] == [
        "boto3",
        "botocore",
        "jmespath",
        "s3transfer",
    ]
    assert all(re.fullmatch(r"[a-z0-9]+==[0-9.]+", line) for line in lines)


def start(node: Node, key: str, resources: dict[str, int]) -> tuple[list[str], dict[str, str]]:
    """The arguments and the environment of the `ray start` that the commands end in."""
    venv = node.home / "rayloop" / ".venv" / "bin"
    node.stand_in(venv / "ray", f"env -0 > {node.home}/env")
    node.stand_in(venv / "python")
    stop, command = CLUSTER[key]
    assert stop == "ray stop"
    (prefixed,) = util.with_envs(
        [command], {"RAY_enable_autoscaler_v2": "1", "RAY_HEAD_IP": "10.0.0.7"}
    )
    calls = node.run(prefixed, RAY_OVERRIDE_RESOURCES=resources)
    environment = dict(
        pair.split("=", 1) for pair in (node.home / "env").read_text().split("\0") if pair
    )
    assert "sudo install -d -m 700 -o" in calls
    assert f"python {node.home}/rayloop/deploy/front.py /var/lib/rayloop" in calls
    last = calls.splitlines()[-1]
    assert last.startswith("ray start ")
    return shlex.split(last.removeprefix("ray start ")), environment


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_start_commands_give_ray_its_environment_and_arguments_it_knows(node, key):
    arguments, environment = start(node, key, {"CPU": 0, "GPU": 0})
    assert ray_env().items() <= environment.items()
    assert environment["PATH"].startswith(f"{node.home}/rayloop/.venv/bin:")
    assert environment["PYTHONPATH"] == f"{node.home}/rayloop"
    assert json.loads(environment["RAY_OVERRIDE_RESOURCES"]) == {"CPU": 0, "GPU": 0}
    assert "RAY_AUTH_TOKEN" not in environment  # a file, which `ps` and `env` do not show
    with scripts.start.make_context("start", list(arguments)) as context:
        parsed = context.params
    ports = ["node_manager_port", "object_manager_port", "dashboard_agent_listen_port"]
    assert [parsed[name] for name in ports] == [6380, 6381, 6382]
    assert parsed["metrics_export_port"] == 8080
    assert (parsed["min_worker_port"], parsed["max_worker_port"]) == (10002, 19999)
    assert parsed["object_spilling_directory"] == environment["SPILL"]
    with pytest.raises(click.UsageError):
        scripts.start.make_context("start", [*arguments, "--object-spill-directory=/tmp"])


def test_the_head_listens_for_people_on_itself_only_and_starts_the_autoscaler_that_gives_up(node):
    arguments, environment = start(node, "head_start_ray_commands", {"CPU": 0, "GPU": 0})
    parsed = scripts.start.make_context("start", arguments).params
    assert parsed["head"] is True
    assert parsed["port"] == 6379
    assert parsed["dashboard_host"] == "127.0.0.1"
    assert parsed["autoscaling_config"] == "~/ray_bootstrap_config.yaml"  # Ray knows the ~
    assert environment["RAY_enable_autoscaler_v2"] == "0"  # the launcher's own 1 came before
    module, function = environment["RAY_AUTOSCALER_UTILIZATION_SCORER"].rsplit(".", 1)
    code = f"import {module} as m; print(callable(m.{function}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(node.home / "rayloop")},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"


def test_a_worker_joins_the_head_it_is_told(node):
    arguments, environment = start(node, "worker_start_ray_commands", {"CPU": 8, "GPU": 1})
    parsed = scripts.start.make_context("start", arguments).params
    assert (parsed["head"], parsed["address"]) == (False, "10.0.0.7:6379")
    assert environment["SPILL"] == "/opt/dlami/nvme/ray-spill"  # the stand-in says: mounted
    node.stand_in(node.bin / "mountpoint", "exit 1")
    _, environment = start(node, "worker_start_ray_commands", {"CPU": 8, "GPU": 0})
    assert environment["SPILL"] == "/var/tmp/ray-spill"


def test_a_node_that_cannot_be_prepared_does_not_start_ray(node):
    node.stand_in(node.home / "rayloop" / ".venv" / "bin" / "ray")
    node.stand_in(node.home / "rayloop" / ".venv" / "bin" / "python", "exit 1")
    with pytest.raises(AssertionError):
        node.run(CLUSTER["worker_start_ray_commands"][1])
    assert "ray start" not in node.log.read_text()


def test_no_port_is_opened_to_the_world():
    """The launcher's own group lets in SSH and the machines' traffic; this file adds nothing."""
    assert "security_group" not in CLUSTER["provider"]
    text = json.dumps(CLUSTER)
    assert "0.0.0.0" not in text
    assert "SecurityGroupIds" not in text


def test_the_token_is_copied_to_every_node_and_its_making_is_named():
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "get-auth-token --generate" in (ROOT / "cluster.yaml").read_text()
    assert "get-auth-token" in scripts.cli.commands


def test_what_is_copied_is_what_is_needed_and_not_the_whole_folder():
    """The launcher reads every byte of it, twice."""
    sources = [ROOT / local for local in CLUSTER["file_mounts"].values() if local[0] != "~"]
    assert all(source.exists() for source in sources)
    assert ROOT not in [source.resolve() for source in sources]
    environments = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()
                    if line.startswith(".venv")}  # fmt: skip
    assert environments | {".rayloop", ".git"} <= set(CLUSTER["rsync_exclude"])
    assert NodeUpdater  # the launcher's class that copies and runs them


# --- the roles


def test_the_roles_that_the_file_names_are_made_for_one_bucket(node):
    node.stand_in(
        node.bin / "aws",
        'case "$*" in *get-caller*) echo 123456789012;; *"iam get-"*) exit 1;; esac',
    )
    done = subprocess.run(
        [ROOT / "deploy" / "aws_roles.sh", "pictures"],
        env={"PATH": f"{node.bin}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    calls = node.log.read_text()
    named = {pool["node_config"]["IamInstanceProfile"]["Name"] for pool in POOLS.values()}
    for role in named:
        assert f"create-instance-profile --instance-profile-name {role}" in calls
    policies = [
        json.loads(text)
        for text in re.findall(r"--policy-document (\{.*?\]\})\n", calls, re.DOTALL)
    ]
    worker, head = ([s["Action"] for s in p["Statement"]] for p in policies)
    assert not any("ec2:RunInstances" in action for action in worker)
    assert {"iam:PassRole", "ssm:GetParameters"} <= {a for a in head if isinstance(a, str)}
    assert "arn:aws:s3:::pictures/*" in calls
    assert "AWSServiceRoleForEC2Spot" in calls
    without = subprocess.run([ROOT / "deploy" / "aws_roles.sh"], capture_output=True, text=True)
    assert without.returncode != 0
    assert "usage" in without.stderr
