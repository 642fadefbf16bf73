"""A cluster of hosts, each with a network of its own: jobs, cut cables, lost machines, serving.

One Ray for the whole file, started as on a cluster, with the state of its head in a Redis. The
commands come from a host that is not part of it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayloop.config import ServeConfig
from rayloop.haproxy import environment as haproxy_environment
from tests.debian import debian_programs, libraries
from tests.e2e.conftest import LONG, ROOT, Done, environment, run_job
from tests.e2e.hosts import BIN, Host, Hosts, hosts, wait_for
from tests.releases import register_all

TRAIN = ["--train.epochs", "30", "--train.floor_epochs", "0", "--train.cpus_per_worker", "1",
         "--train.checkpoint_every_epochs", "1"]  # fmt: skip
STORE_BYTES = 200_000_000
PORT = 8000
FRONT = "/tmp/ray/front"
REDIS = ["redis-tools", "libjemalloc2", "liblua5.1-0", "liblzf1", "lua-bitop", "lua-cjson"]


@dataclass
class Cluster:
    """The hosts of a Ray, and one beside it."""

    hosts: Hosts
    home: Path
    head: Host
    nodes: list[Host]
    client: Host
    redis: str

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:8265"

    def start_head(self) -> None:
        redis = {"RAY_REDIS_ADDRESS": self.redis} if self.redis else {}
        self._start(
            self.head, "--head", "--port=6379", "--num-cpus=0", "--dashboard-host=0.0.0.0", **redis
        )

    def join(self, host: Host) -> None:
        self._start(host, f"--address={self.head.address}:6379", "--num-cpus=1")

    def _start(self, host: Host, *words: str, **env: str) -> None:
        host.run("mkdir", "-p", FRONT)
        front = "from rayloop.haproxy import *; import sys; from pathlib import Path as P;"
        front += (
            "from rayloop.config import ServeConfig; write_front(P(sys.argv[1]), ServeConfig())"
        )
        done = host.run(sys.executable, "-c", front, FRONT)
        assert done.returncode == 0, done.stderr
        done = host.run(
            BIN / "ray", "start", *words, f"--node-ip-address={host.address}",
            f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", **env,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def rayloop(self, *words: str, **env: str) -> Done:
        """A command on the host that is not part of the cluster."""
        return self.client.run(
            BIN / "rayloop", *words, RAY_API_SERVER_ADDRESS=self.dashboard, **env
        )

    def wait_for_everyone(self, timeout_s: float = 120) -> None:
        """Wait until the head knows exactly the nodes there are."""
        wait_for(lambda: self.alive() == len(self.nodes) + 1, timeout_s, "every node")

    def add(self, name: str, last: int) -> None:
        """One more machine."""
        self.nodes.append(self.hosts.add(name, last))
        self.join(self.nodes[-1])

    def alive(self) -> int:
        done = self.rayloop("status", "--json")
        return len(json.loads(done.stdout)["cluster"]["nodes"]) if done.returncode == 0 else 0


@pytest.fixture(scope="module")
def home(data_home: Path) -> Path:
    return data_home


@pytest.fixture(scope="module")
def cluster(
    home: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    throughput = haproxy_environment(Path("/tmp"), ServeConfig())
    files = {name: value.replace("/tmp", FRONT, 1) for name, value in throughput.items()}
    env = {
        **environment(home),
        **files,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    redis = debian_programs(request.config.cache, REDIS, {"redis-server": "redis-check-rdb"})
    with hosts(env, folder) as made:
        store = made.add("store", 9)
        server = folder / "redis-server"  # the file decides by its name what it is
        server.symlink_to(redis["redis-server"])
        store.env["LD_LIBRARY_PATH"] = libraries(redis["redis-server"])
        store.start(server, "--bind", store.address, "--protected-mode", "no", "--save", "",
                    stdout=subprocess.DEVNULL)  # fmt: skip
        head, client = made.add("head", 1), made.add("client", 2)
        nodes = [made.add(name, 3 + number) for number, name in enumerate(("one", "two", "three"))]
        whole = Cluster(made, home, head, nodes, client, redis=f"{store.address}:6379")
        whole.start_head()
        for node in nodes:
            whole.join(node)
        whole.wait_for_everyone()
        yield whole


@pytest.fixture(scope="module")
def by_hand(home: Path) -> dict[str, Any]:
    """What the same words give on a laptop."""
    done = run_job(home, "jobs/train.py", "smoke", *TRAIN, "--run-id", "by-hand")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.last_line


def test_a_job_on_several_hosts_gives_the_model_of_a_laptop(cluster: Cluster, by_hand) -> None:
    done = cluster.rayloop("submit", "train", "smoke", *TRAIN, "--run-id", "hosts")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.last_line["num_workers"] == 2
    assert done.last_line["checkpoint_digest"] == by_hand["checkpoint_digest"]


def workers(cluster: Cluster) -> list[Host]:
    """Hosts on which a training worker runs."""
    return [host for host in cluster.nodes if host.run("pgrep", "-f", "RayTrainWorker").stdout]


def newest(home: Path, run_id: str) -> int:
    folders = sorted((home / "runs" / run_id / "checkpoints").glob("step-*"))
    return int(folders[-1].name.split("-")[1]) if folders else 0


def start_training(cluster: Cluster, run_id: str, *more: str) -> subprocess.Popen[str]:
    job = cluster.client.start(
        BIN / "rayloop", "submit", "train", "smoke", *TRAIN, "--run-id", run_id,
        "--address", cluster.dashboard, *more,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for(lambda: newest(cluster.home, run_id) > 30 or job.poll() is not None, 120, "training")
    assert job.poll() is None, job.communicate()[0]
    return job


@LONG
def test_a_cable_that_is_plugged_in_again_costs_nothing_but_time(cluster, by_hand) -> None:
    """Shorter than Ray's patience, that is; a longer cut is a lost machine."""
    job = start_training(cluster, "cable")
    cut, _ = workers(cluster)  # one worker each
    cut.pull_cable()
    time.sleep(4)
    cut.plug_in()
    told, _ = job.communicate(timeout=240)
    assert job.returncode == 0, told[-3000:]
    result = json.loads(told.strip().splitlines()[-1])
    assert result["checkpoint_digest"] == by_hand["checkpoint_digest"]
    assert cluster.alive() == len(cluster.nodes) + 1


def test_a_machine_that_loses_its_power_costs_at_most_the_steps_since_a_checkpoint(
    cluster, by_hand
) -> None:
    """The run goes on with fewer workers, and no bit changes."""
    job = start_training(cluster, "power", "--train.min_workers", "1")
    lost = workers(cluster)[0]
    lost.cut_power()
    cluster.nodes.remove(lost)
    told, _ = job.communicate(timeout=300)
    assert job.returncode == 0, told[-3000:]
    result = json.loads(told.strip().splitlines()[-1])
    assert result["interruptions"] >= 1
    assert result["lost_steps"] <= by_hand["steps"] / 30  # epochs: the interval of checkpoints
    assert result["checkpoint_digest"] == by_hand["checkpoint_digest"]
    seen = json.loads(cluster.rayloop("status", "--json").stdout)["cluster"]
    assert [failure for failure in seen["failures"] if failure["what"] == "node"]
    cluster.add("four", 6)
    cluster.wait_for_everyone()


@LONG
def test_a_run_that_shrank_grows_when_a_machine_joins(cluster: Cluster) -> None:
    while len(cluster.nodes) > 2:  # a machine for each worker and none to spare
        cluster.nodes.pop().cut_power()
    cluster.wait_for_everyone()
    more = ["--train.min_workers", "1", "--train.epochs", "4000"]
    job = start_training(cluster, "grows", *more)
    try:
        lost = workers(cluster)[0]
        lost.cut_power()
        cluster.nodes.remove(lost)
        wait_for_steps(cluster, "grows")
        assert len(workers(cluster)) == 1
        cluster.add("five", 7)
        cluster.add("six", 8)
        wait_for(lambda: len(workers(cluster)) == 2, 180, "a second worker")
        wait_for_steps(cluster, "grows")
    finally:
        for running in json.loads(cluster.rayloop("status", "--json").stdout)["cluster"]["jobs"]:
            if running["status"] == "RUNNING":
                assert cluster.rayloop("stop", running["name"]).returncode == 0
        told, _ = job.communicate(timeout=120)
    assert job.returncode == 143, told[-3000:]
    cluster.wait_for_everyone()


def wait_for_steps(cluster: Cluster, run_id: str) -> None:
    """Wait until another checkpoint is there."""
    step = newest(cluster.home, run_id)
    wait_for(lambda: newest(cluster.home, run_id) > step, 120, f"{run_id} goes on")


def config_of(cluster: Cluster, **args: Any) -> dict[str, Any]:
    """serve_apps/classifier.yaml for these hosts."""
    config = yaml.safe_load((ROOT / "serve_apps" / "classifier.yaml").read_text())
    app = config["applications"][0]
    app["args"] |= {"home": str(cluster.home), "tracking_uri": "", "max_replicas": 2, **args}
    return config


def deploy(cluster: Cluster, config: dict[str, Any]) -> None:
    """`serve deploy`, and wait until what is meant runs."""
    file = cluster.home / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    done = cluster.client.run(BIN / "serve", "deploy", "-a", cluster.dashboard, file)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: running(cluster) == 2, 240, "two replicas")


def running(cluster: Cluster) -> int:
    """Replicas of an application that is whole."""
    done = cluster.rayloop("status", "--json", "--seconds", "0.1")
    if done.returncode:
        return -1
    apps = json.loads(done.stdout)["cluster"]["apps"]
    return sum(app["replicas"] for app in apps if app["status"] == "RUNNING")


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Cluster:
    register_all(cluster.home, 3)
    deploy(cluster, config_of(cluster))
    wait_for(lambda: len(answering(cluster)) >= 3, 60, "the head and two nodes answer")
    return cluster


def answering(cluster: Cluster) -> list[Host]:
    """Hosts whose HAProxy answers: Serve keeps one where a replica is, and on the head."""
    return [host for host in (cluster.head, *cluster.nodes) if is_ready(cluster, host)]


def is_ready(cluster: Cluster, host: Host) -> bool:
    url = f"http://{host.address}:{PORT}/v2/health/ready"
    return cluster.client.run("curl", "-sf", "-m", "5", url).returncode == 0


class Load:
    """Requests from the client to one host, for as long as the block lasts."""

    def __init__(self, cluster: Cluster, host: Host) -> None:
        # A proxy that was started a moment ago knows of no application yet.
        wait_for(lambda: is_ready(cluster, host), 120, f"{host.name} answers")
        self.stop = cluster.home / f"stop-{time.monotonic_ns()}"
        url = f"http://{host.address}:{PORT}"
        self.process = cluster.client.start(
            sys.executable, ROOT / "tests/e2e/load.py", url, self.stop, stdout=subprocess.PIPE
        )
        self.result: dict[str, Any] = {}

    def __enter__(self) -> "Load":
        time.sleep(2)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.touch()
        self.result = json.loads(self.process.communicate(timeout=60)[0])


def test_replicas_are_spread_over_hosts(served: Cluster) -> None:
    seen = json.loads(served.rayloop("status", "--json").stdout)["cluster"]
    assert [(app["replicas"], app["nodes"]) for app in seen["apps"]] == [(2, 2)]
    assert len(seen["urls"]) == 3


def test_traffic_and_limits_change_in_place(served: Cluster) -> None:
    before = {replica["replica"]: replica["limits"] for replica in snapshots(served)}
    with Load(served, served.head) as load:
        server = f"http://{served.head.address}:{PORT}"
        done = served.rayloop("traffic", "set", "champion=0.5", "3=0.5", "--url", server)
        assert done.returncode == 0, done.stderr
        config = config_of(served)
        config["applications"][0]["deployments"][0]["user_config"]["max_queued_rows"] = 2048
        deploy(served, config)
        wait_for(
            lambda: all(one["limits"]["max_queued_rows"] == 2048 for one in snapshots(served)),
            60, "the new limit",
        )  # fmt: skip
    assert load.result["failed"] == []
    assert set(load.result["versions"]) >= {"3"} and len(load.result["versions"]) == 2
    assert {limits["max_queued_rows"] for limits in before.values()} == {1024}
    assert {replica["replica"] for replica in snapshots(served)} == set(before)  # the same ones


def snapshots(cluster: Cluster) -> list[dict[str, Any]]:
    """What the replicas that run tell of themselves."""
    url = f"http://{cluster.head.address}:{PORT}/rayloop/status"
    done = cluster.client.run("curl", "-s", "-m", "10", url)
    return json.loads(done.stdout)["replicas"]


def replicas(cluster: Cluster) -> set[str]:
    """Their names."""
    return {replica["replica"] for replica in snapshots(cluster)}


@LONG
def test_the_application_is_replaced_without_a_failed_request(served: Cluster) -> None:
    before = replicas(served)
    with Load(served, served.head) as load:
        config = config_of(served, max_batch_rows=16)
        config["applications"][0]["runtime_env"] = {"env_vars": {"RELEASE": "2"}}
        deploy(served, config)
        wait_for(lambda: not (before & replicas(served)), 120, "new replicas alone")
        time.sleep(1)
    assert load.result["failed"] == []


def test_the_head_is_replaced_while_the_others_serve(served: Cluster) -> None:
    node = next(host for host in answering(served) if host is not served.head)
    with Load(served, node) as load:
        served.head.cut_power()
        time.sleep(10)
        served.hosts.hosts.remove(served.head)
        served.head = served.hosts.add("head", 1)
        served.start_head()
        served.wait_for_everyone(240)
        wait_for(lambda: running(served) == 2, 240, "two replicas under the new head")
        time.sleep(3)
    assert sum(load.result["versions"].values()) > 100
    assert load.result["failed"] == []


def test_a_host_with_a_replica_loses_its_power_under_load(served: Cluster) -> None:
    lost = next(host for host in answering(served) if host is not served.head)
    with Load(served, served.head) as load:
        lost.cut_power()
        wait_for(lambda: lost.address not in urls(served), 60, "the loss is seen")
        wait_for(lambda: running(served) == 2, 240, "a replica elsewhere")
        time.sleep(2)
    assert load.result["failed"] == []


def urls(cluster: Cluster) -> str:
    """Where Serve says that it answers."""
    return str(json.loads(cluster.rayloop("status", "--json").stdout)["cluster"]["urls"])
