"""The nodes of a cluster and a configuration -> how trials are trained and how many at once."""

import math
from dataclasses import dataclass
from typing import Literal

from rayloop.cluster import SPARE_CPUS
from rayloop.config import Config
from rayloop.errors import ConfigError, DoesNotFit

PROCESS_BYTES = 500_000_000
"""What a process that has torch loaded takes on a CPU, beside its data (0.4 GB measured)."""
DDP_PROCESSES = 2
"""Processes of that size that a trial by workers of its own has beside them."""
COORDINATOR_CPUS = 0.1
"""Most that the trials' own processes beside their workers ask for on a node."""
DDP_MIN_CPUS = 8
"""CPUs from which on workers of their own pay for a trial where there are no GPUs."""


@dataclass(frozen=True, slots=True)
class Room:
    """How trials run.

    Attributes:
        kind: `function` or `ddp`, see `TuneConfig.trainable`.
        num_workers: Processes that train one trial.
        cpus_per_worker: CPUs, and threads, of each.
        gpus_per_worker: GPUs of each.
        max_concurrent: Trials at once.
    """

    kind: Literal["function", "ddp"]
    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: int
    max_concurrent: int


def plan_room(
    config: Config, nodes: list[tuple[float, float]], memory_bytes: float = math.inf
) -> Room:
    """Decide how trials are trained, or refuse what could never be scheduled.

    Args:
        config: The sweep's settings.
        nodes: CPUs and GPUs of each live node.
        memory_bytes: Of all nodes, for processes.

    Raises:
        DoesNotFit: Not one trial fits, or fewer at once than were asked for.
        ConfigError: A population needs trials in one process.
    """
    train, tune = config.train, config.tune
    kind = tune.trainable
    if kind == "ddp" and tune.search == "pbt":
        raise ConfigError(
            "tune.trainable=ddp and tune.search=pbt do not go together: a turn of a population is "
            "trained in one process. Use --tune.trainable function."
        )
    if kind == "function" and config.data.feed == "stream":
        raise ConfigError(
            "tune.trainable=function reads whole splits into memory, and data.feed=stream says "
            "that they do not fit. Use --tune.trainable ddp, or --data.feed auto."
        )
    if kind == "auto" and config.data.feed == "stream":
        kind = "ddp"
    if kind == "auto":
        kind = "ddp" if tune.search != "pbt" and _ddp_pays(config, nodes) else "function"
    num_workers = train.num_workers if kind == "ddp" else 1
    cpus, gpus = train.cpus_per_worker or 1, int(train.use_gpu)
    processes = num_workers + (DDP_PROCESSES if kind == "ddp" else 0)
    in_memory = memory_bytes / (processes * PROCESS_BYTES)
    places = int(min(_trials_at_once(nodes, num_workers, cpus, gpus), max(1, in_memory)))
    have = (
        f"the cluster has {sum(c for c, _ in nodes):g} CPUs, {SPARE_CPUS} of them for the driver, "
        f"and {sum(g for _, g in nodes):g} GPUs on {len(nodes)} node(s)"
        f"{f', and {memory_bytes / 1e9:.0f} GB of memory' if memory_bytes < math.inf else ''}"
    )
    each = f"{num_workers * cpus} CPUs and {num_workers * gpus} GPUs"
    if places < 1:
        raise DoesNotFit(
            f"A trial with tune.trainable={kind} needs {each}; {have}. Lower train.cpus_per_worker "
            "or train.num_workers, use --tune.trainable function, or offer more with "
            "--cluster.num_cpus."
        )
    if tune.max_concurrent > places:
        raise DoesNotFit(
            f"tune.max_concurrent={tune.max_concurrent} trials of {each} each do not fit at once; "
            f"{have}, which is room for {places}. Lower it, or leave it out."
        )
    return Room(kind, num_workers, cpus, gpus, tune.max_concurrent or places)


def _ddp_pays(config: Config, nodes: list[tuple[float, float]]) -> bool:
    train = config.train
    two_fit = _trials_at_once(
        nodes, train.num_workers, train.cpus_per_worker or 1, int(train.use_gpu)
    )
    is_large = train.use_gpu or sum(cpus for cpus, _ in nodes) - SPARE_CPUS >= DDP_MIN_CPUS
    return train.num_workers > 1 and two_fit >= 2 and is_large


def _trials_at_once(
    nodes: list[tuple[float, float]], num_workers: int, cpus: int, gpus: int
) -> int:
    """Trials that fit, whose workers each stay on one node; some CPUs are kept for the driver."""
    total = sum(c for c, _ in nodes)
    allowed = (total - SPARE_CPUS if total > SPARE_CPUS else total) // cpus
    taken = COORDINATOR_CPUS if num_workers > 1 else 0.0  # what starts the workers, on any node
    places = sum(
        int(min((c - taken) // cpus, g // gpus if gpus else float("inf"))) for c, g in nodes
    )
    return int(min(places, allowed) // num_workers)
