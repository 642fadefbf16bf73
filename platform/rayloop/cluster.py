"""Connect to Ray with the right environment, and say at once whether there is room for a run.

Ray reads most of its switches once, when a process starts, so they are set here before Ray is
imported: prompt worker polling for Train, HAProxy and throughput mode for Serve, a token for
a local cluster that is not written to the user's home.
"""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from rayloop.config import ClusterConfig
from rayloop.errors import DoesNotFit
from rayloop.logs import stage_logger

log = stage_logger("cluster")

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


def set_environment(extra: dict[str, str] | None = None) -> None:
    """Set the switches Ray reads at start; what the user has set already stays.

    Args:
        extra: Further variables, e.g. those of `rayloop.haproxy.environment`.
    """
    for name, value in {
        **QUIET_ENVIRONMENT,
        **TRAIN_ENVIRONMENT,
        **TUNE_ENVIRONMENT,
        **(extra or {}),
    }.items():
        os.environ.setdefault(name, value)


@contextmanager
def connect(config: ClusterConfig, extra: dict[str, str] | None = None) -> Iterator[None]:
    """Hold a connection to Ray, and stop on leaving exactly what was started here.

    With an address, in the configuration or in RAY_ADDRESS (as inside a submitted job), an
    existing cluster is joined; else a local one is started on free ports and stopped at the end.
    """
    set_environment(extra)
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray  # noqa: PLC0415  Ray reads the environment when it is imported

    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=offered_cpus(config),
            object_store_memory=config.object_store_bytes or None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in the place of ours
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def machine_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def offered_cpus(config: ClusterConfig) -> int:
    """Logical CPUs a local Ray is started with."""
    return (config.num_cpus or machine_cores()) + SPARE_CPUS


def check_room(num_workers: int, cpus_per_worker: int, use_gpu: bool) -> int:
    """Refuse at once what the connected cluster cannot schedule; Ray would wait for ever.

    Args:
        num_workers: Workers wanted.
        cpus_per_worker: CPUs of each; 0 divides those there are.
        use_gpu: Each worker also needs one GPU.

    Returns:
        CPUs of each worker.

    Raises:
        DoesNotFit: The sums, per node, and what to change.
    """
    cpus = cpus_per_worker or divide_cpus(cpus_of_nodes(), num_workers)
    refuse_unless_fits(sizes_of_nodes(), num_workers, cpus, use_gpu)
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


def refuse_unless_fits(
    nodes: list[tuple[float, float]], num_workers: int, cpus_per_worker: int, use_gpu: bool
) -> None:
    """Check that workers fit on nodes, and that the cluster keeps CPUs for the data stage.

    Args:
        nodes: CPUs and GPUs of each node.
        num_workers: Workers wanted.
        cpus_per_worker: CPUs of each, which cannot be spread over nodes.
        use_gpu: Each worker also needs one GPU.

    Raises:
        DoesNotFit: They do not fit.
    """
    total_cpus, total_gpus = sum(cpus for cpus, _ in nodes), sum(gpus for _, gpus in nodes)
    places = sum(
        int(min(cpus // cpus_per_worker, gpus if use_gpu else float("inf"))) for cpus, gpus in nodes
    )
    wanted = num_workers * cpus_per_worker
    have = f"the cluster has {total_cpus:g} CPUs and {total_gpus:g} GPUs on {len(nodes)} node(s)"
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
