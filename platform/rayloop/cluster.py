"""Connect to Ray with the right environment, and say at once whether there is room for a run.

Ray reads most of its switches once, when a process starts, so they are set here before Ray is
imported: prompt worker polling for Train, HAProxy and throughput mode for Serve, a token for
a local cluster that is not written to the user's home.
"""

import json
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import rayloop
from rayloop.config import ClusterConfig
from rayloop.errors import DoesNotFit, RequestError, Unreachable
from rayloop.growth import nodes_to_come
from rayloop.logs import stage_logger
from rayloop.submit.arrival import SUBMITTED

log = stage_logger("cluster")

REACH_TIMEOUT_S = 5.0
SPARE_CPUS = 2
"""Logical CPUs a local Ray offers beyond the machine's cores: the driver's side work (data
preparation, the progress board, Serve's controller) mostly waits while workers run."""

TRAIN_ENVIRONMENT = {
    # The default of 2 s makes every report slow and loses up to one extra checkpoint interval.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # How long an elastic run waits for workers on a node that is lost; starting is tried again.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}
TUNE_ENVIRONMENT = {
    # A sweep keeps its own records, each written before it has an effect.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    # Every record is to be answered before the next epoch begins.
    "TUNE_RESULT_BUFFER_LENGTH": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial that was stopped early leaves its thread at its next record.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "30",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
}


LOCAL_RAY = "RAYLOOP_LOCAL_RAY"
LOCAL_ENVIRONMENT = {
    LOCAL_RAY: "1",
    # Nobody tells a laptop that it is going to be taken away; the watcher is a process of its own.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
SWITCHES = {**QUIET_ENVIRONMENT, **TRAIN_ENVIRONMENT, **TUNE_ENVIRONMENT}
"""What Ray reads at start."""


def set_environment(extra: dict[str, str] | None = None) -> None:
    """Set the switches Ray reads at start; what the user has set already stays.

    Args:
        extra: Further variables, e.g. those of `rayloop.haproxy.environment`.
    """
    for name, value in {**SWITCHES, **(extra or {})}.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect(config: ClusterConfig, extra: dict[str, str] | None = None) -> Iterator[None]:
    """Hold a connection to Ray, and stop on leaving exactly what was started here.

    With an address, in the configuration or in RAY_ADDRESS (as inside a submitted job), an
    existing cluster is joined; else a local one is started on free ports and stopped at the end.

    Raises:
        RequestError: The cluster named does not answer or cannot be joined.
    """
    set_environment(extra)
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    added: list[str] = []
    if address:
        _join(address)
    else:
        added = _start(config)
    import ray  # noqa: PLC0415  Ray reads the environment when it is imported

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in the place of ours
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        _forget(added)


def _join(address: str) -> None:
    """Connect to a cluster, whatever Ray a process that started this one had of its own."""
    if is_local():
        _forget(LOCAL_ENVIRONMENT)
    refuse_unreachable(address)
    import ray  # noqa: PLC0415

    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    with _in_our_words(address):
        ray.init(
            address=address,
            runtime_env=_own_code(os.environ),
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


def _start(config: ClusterConfig) -> list[str]:
    """Start a Ray of this process's own; gives the variables that tell of it and were not set."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    added = [name for name in LOCAL_ENVIRONMENT if name not in os.environ]
    os.environ.update({name: LOCAL_ENVIRONMENT[name] for name in added})
    import ray  # noqa: PLC0415

    ray.init(
        address="local",
        num_cpus=offered_cpus(config),
        object_store_memory=config.object_store_bytes or None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    return added


def _forget(names: Iterable[str]) -> None:
    for name in names:
        os.environ.pop(name, None)


def is_local() -> bool:
    """Whether `connect` started the Ray of this process: it has no dashboard and ends with us."""
    return LOCAL_RAY in os.environ


def refuse_unreachable(address: str) -> None:
    """Refuse an address where no cluster is; Ray itself would try for minutes.

    Args:
        address: As `ray.init` takes it: HOST:PORT of the head, `auto`, or `ray://HOST:PORT`.

    Raises:
        RequestError: It is the URL of a dashboard.
        Unreachable: Nothing answers there.
    """
    if address.startswith(("http://", "https://")):
        raise RequestError(
            f"{address} is a dashboard, to which jobs are submitted: rayloop submit JOB PRESET. "
            "To run here on that cluster set RAY_ADDRESS, or --cluster.address, to HOST:PORT of "
            "its head, and leave it out for a Ray of this command's own."
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return  # `auto` and the like, which Ray looks up on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
    except OSError as error:
        raise Unreachable(
            f"There is no Ray at {address} ({error}). Correct --cluster.address or RAY_ADDRESS, "
            "start that cluster, or leave it out for a Ray of this command's own."
        ) from None


@contextmanager
def _in_our_words(address: str) -> Iterator[None]:
    """Let what Ray says of a cluster that it cannot join be one sentence."""
    try:
        yield
    except Exception as error:
        from ray.exceptions import AuthenticationError  # noqa: PLC0415

        if not isinstance(error, ConnectionError | ValueError | RuntimeError | AuthenticationError):
            raise
        reason = " ".join(str(error).split())[:400]
        raise RequestError(
            f"The Ray at {address} cannot be joined: {reason} Its Ray and Python must be of the "
            "versions here, and its token in RAY_AUTH_TOKEN_PATH with RAY_AUTH_MODE=token."
        ) from None


def _own_code(environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Let every worker of a cluster run this process's package, whatever its node has installed.

    Empty where the job was submitted with a package of its own.
    """
    job = json.loads(environment.get(SUBMITTED, "{}"))
    if job.get("runtime_env", {}).get("py_modules"):
        return {}
    return {"py_modules": [str(Path(rayloop.__file__).parent)]}


def machine_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def offered_cpus(config: ClusterConfig) -> int:
    """Logical CPUs a local Ray is started with."""
    return (config.num_cpus or machine_cores()) + SPARE_CPUS


def check_room(num_workers: int, cpus_per_worker: int, use_gpu: bool) -> int:
    """Refuse at once what the connected cluster cannot schedule; Ray would wait for ever.

    What does not fit now and will once an autoscaler has added nodes is let through.

    Args:
        num_workers: Workers wanted.
        cpus_per_worker: CPUs of each; 0 divides those there are.
        use_gpu: Each worker also needs one GPU.

    Returns:
        CPUs of each worker.

    Raises:
        DoesNotFit: The sums, per node, and what to change.
    """
    nodes, to_come = sizes_of_nodes(), nodes_to_come(use_gpu)
    cpus = cpus_per_worker or divide_cpus([cpus for cpus, _ in nodes], num_workers)
    try:
        refuse_unless_fits(nodes, num_workers, cpus, use_gpu)
    except DoesNotFit as error:
        if not to_come:
            raise
        cpus = cpus_per_worker or cpus_beside_gpus(to_come if use_gpu else [])
        refuse_unless_fits(to_come, num_workers, cpus, use_gpu, could="with all it may add, ")
        log.info("waiting for the autoscaler to add nodes: %s", error)
    return cpus


def sizes_of_nodes() -> list[tuple[float, float]]:
    """CPUs and GPUs of each live node of the connected cluster."""
    return [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in _live_nodes()]


def memory_of_nodes() -> list[float]:
    """Bytes of memory for processes on each live node, as Ray found them at its start."""
    return [node.get("memory", 0.0) for node in _live_nodes()]


def cpus_of_nodes() -> list[float]:
    """CPUs of each live node of the connected cluster."""
    return [node.get("CPU", 0.0) for node in _live_nodes()]


def _live_nodes() -> list[dict[str, Any]]:
    import ray  # noqa: PLC0415

    return [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]


def divide_cpus(cpus_of_nodes: list[float], num_workers: int) -> int:
    """Most CPUs each worker can have so that all fit on the nodes, with one to spare; at least 1.

    Args:
        cpus_of_nodes: CPUs of each node.
        num_workers: Workers that share them.
    """
    each = 1
    while (
        sum(int(cpus // (each + 1)) for cpus in cpus_of_nodes) >= num_workers
        and (each + 1) * num_workers + 1 <= sum(cpus_of_nodes)
    ):  # fmt: skip
        each += 1
    return each


def cpus_beside_gpus(nodes: list[tuple[float, float]]) -> int:
    """CPUs that a worker with one GPU can have on each of the nodes; 1 without GPUs.

    A worker on CPUs alone gets one of nodes that are yet to come: more would make the autoscaler
    add all it may.

    Args:
        nodes: CPUs and GPUs of each node.
    """
    return max(1, min((int((cpus - 1) // gpus) for cpus, gpus in nodes if gpus), default=1))


def refuse_unless_fits(
    nodes: list[tuple[float, float]],
    num_workers: int,
    cpus_per_worker: int,
    use_gpu: bool,
    could: str = "",
) -> None:
    """Check that workers fit on nodes, and that the cluster keeps CPUs for the data stage.

    Args:
        nodes: CPUs and GPUs of each node.
        num_workers: Workers wanted.
        cpus_per_worker: CPUs of each, which cannot be spread over nodes.
        use_gpu: Each worker also needs one GPU.
        could: What to say of nodes that are not there yet.

    Raises:
        DoesNotFit: They do not fit.
    """
    total_cpus, total_gpus = sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes)
    places = sum(
        int(min(cpus // cpus_per_worker, gpus if use_gpu else float("inf"))) for cpus, gpus in nodes
    )
    wanted = num_workers * cpus_per_worker
    sizes = f"{total_cpus:g} CPUs and {total_gpus:g} GPUs on {len(nodes)} node(s)"
    have = f"{could}the cluster has {sizes}"
    if use_gpu and total_gpus < num_workers:
        raise DoesNotFit(
            f"train.num_workers={num_workers} with train.use_gpu=True needs {num_workers} GPUs; "
            f"{have}. Lower train.num_workers, or train on CPUs with --train.no-use-gpu."
        )
    if places < num_workers or total_cpus < wanted + 1:
        raise DoesNotFit(
            f"train.num_workers={num_workers} x train.cpus_per_worker={cpus_per_worker} needs "
            f"{wanted} CPUs and 1 more for the data stage; {have}. Lower train.num_workers or "
            "train.cpus_per_worker, or offer more with --cluster.num_cpus."
        )
