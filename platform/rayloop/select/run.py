"""Finished runs -> one of them registered: made and timed by tasks on one node of the cluster.

Everything happens on one node, since times of different machines cannot be compared, and INT8
suits the machine it was made for: the driver's node where it has the CPUs, else the first that has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import SPARE_CPUS
from rayloop.config import Config, QuantizeConfig, TrainConfig
from rayloop.data.versions import DatasetVersion, read_split
from rayloop.errors import DoesNotFit, RayloopError
from rayloop.logs import stage_logger
from rayloop.quantize.cpu import cpu_features
from rayloop.quantize.methods import FP32, INT8_STATIC
from rayloop.quantize.result import QuantizeResult
from rayloop.quantize.run import quantize
from rayloop.select.comparison import (
    PICTURE_FILE,
    RECORD_FILE,
    Comparison,
    comparison_folder,
    conclude,
    known_floor,
    save_comparison,
)
from rayloop.select.final import NOT_REGISTERED, register_chosen
from rayloop.select.runs import FoundRuns
from rayloop.select.work import (
    SPLIT,
    Timings,
    candidate_settings,
    find_made,
    make_candidate,
    time_candidates,
)
from rayloop.storage import Storage
from rayloop.train.floor import linear_floor

log = stage_logger("select")


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Where models are made and timed.

    Attributes:
        node_id: Ray's id.
        cpus: CPUs it offers.
    """

    node_id: str
    cpus: int

    def task(self, function: Callable[..., Any], num_cpus: int = 1) -> Any:
        """A function as a Ray task on this node."""
        where: Any = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        return ray.remote(num_cpus=num_cpus, max_retries=1, scheduling_strategy=where)(function)


def select(
    storage: Storage,
    config: Config,
    found: FoundRuns,
    show: Callable[[Comparison], None],
    clock: Clock = SYSTEM_CLOCK,
) -> dict[str, Any]:
    """Compare finished runs on the connected cluster, choose one and register it.

    Args:
        storage: The root everything lives under.
        config: The select section says what decides and whether to register.
        found: What is compared.
        show: Gets the comparison before anything is registered, also when nothing is chosen.
        clock: Stamps records.

    Returns:
        The last line of jobs/select.py.

    Raises:
        WorkError: No candidate is within the limits, or none could be compared.
        GateRefused: The chosen one does not pass a gate on the test split.
    """
    began_s = clock.monotonic()
    node = _choose_node(config.quantize.num_threads)
    features: tuple[str, ...] = _get(node.task(cpu_features).remote())
    comparison = _compare(storage, config, found, node, features, clock)
    folder = comparison_folder(config, found)
    save_comparison(storage, folder, comparison)
    show(comparison)
    chosen = comparison.choice(storage.path(folder))
    registered: dict[str, Any] = NOT_REGISTERED
    if config.select.register:

        def quantize_chosen(run_id: str) -> QuantizeResult:
            return quantize(storage, config.quantize, run_id, node.node_id)

        registered = register_chosen(storage, config, chosen, features, quantize_chosen, clock)
    return {
        **comparison.summary(),
        **registered,
        "picture": storage.path(folder, PICTURE_FILE),
        "record": storage.path(folder, RECORD_FILE),
        "seconds": round(clock.monotonic() - began_s, 1),
    }


def _compare(
    storage: Storage,
    config: Config,
    found: FoundRuns,
    node: Node,
    features: tuple[str, ...],
    clock: Clock,
) -> Comparison:
    """Make what is missing, the floor beside it, then time all models while nothing else works."""
    floor = known_floor(storage, config, found)
    floor_task = None
    if floor is None:
        floor_task = node.task(_floor).remote(storage, config.train, found.dataset)
    made, failed = _make_all(storage, config, found, node, features)
    if floor_task is not None:
        floor = _get(floor_task)
    log.info("timing the models of %d runs in turns", len(made))
    timing = node.task(_time, config.quantize.num_threads)
    timings = _get(timing.remote(storage, made, found.dataset, config.quantize))
    found = replace(found, left_out={**found.left_out, **failed})
    return conclude(storage, config, found, made, timings, floor, clock)


def _make_all(
    storage: Storage, config: Config, found: FoundRuns, node: Node, features: tuple[str, ...]
) -> tuple[list[QuantizeResult], dict[str, str]]:
    """What was made of each run, and why nothing could be made of the others.

    No more tasks run at once than the node has CPUs to spare: each of them needs seconds to load
    what it works with.
    """
    settings = candidate_settings(config.quantize)
    made: dict[str, QuantizeResult] = {}
    for run in found.runs:
        known = find_made(storage, run, settings, features)
        if known and not config.select.remeasure:
            made[run.run_id] = known
    if made:
        log.info("%d of %d runs were compared before", len(made), len(found.runs))
    task = node.task(make_candidate, settings.num_threads)
    waiting = [run.run_id for run in found.runs if run.run_id not in made]
    at_once = max(1, (node.cpus - SPARE_CPUS) // settings.num_threads)
    running: dict[Any, str] = {}
    failed: dict[str, str] = {}
    first_error: RayloopError | None = None
    while waiting or running:
        while waiting and len(running) < at_once:
            run_id = waiting.pop(0)
            running[task.remote(storage, run_id, settings, SYSTEM_CLOCK)] = run_id
        (done, *_), _ = ray.wait(list(running))
        run_id = running.pop(done)
        try:
            made[run_id] = _get(done)
            _tell(made[run_id], len(made) + len(failed), len(found.runs))
        except RayloopError as error:
            failed[run_id] = str(error)
            first_error = first_error or error
            log.warning("run %s is left out: %s", run_id, error)
    if first_error and not made:
        raise first_error
    return [made[run.run_id] for run in found.runs if run.run_id in made], failed


def _tell(result: QuantizeResult, done: int, of: int) -> None:
    fp32, int8 = (result.method(name).accuracy for name in (FP32, INT8_STATIC))
    log.info("%d of %d: %s, fp32 %.4f, INT8 %.4f, gate: %s", done, of, result.run_id, fp32, int8,
             result.gate)  # fmt: skip


def _choose_node(num_threads: int) -> Node:
    """The driver's node where it has the CPUs, else the first that has.

    Raises:
        DoesNotFit: No node has them.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [
        Node(node_id=entry["NodeID"], cpus=int(entry["Resources"].get("CPU", 0)))
        for entry in cast(Any, ray).nodes()
        if entry["Alive"]
    ]
    able = [node for node in nodes if node.cpus >= num_threads]
    if not able:
        most = max((node.cpus for node in nodes), default=0)
        raise DoesNotFit(
            f"quantize.num_threads={num_threads} needs a node with as many CPUs; the largest one "
            f"here has {most}. Lower --quantize.num_threads."
        )
    return min(able, key=lambda node: (node.node_id != here, node.node_id))


def _get(reference: Any) -> Any:
    """What a task gave; its error, where rayloop raised it, without Ray's around it."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayloopError):
            raise error.cause from None
        raise


def _floor(storage: Storage, train: TrainConfig, dataset: DatasetVersion) -> float | None:
    rows, val_rows = (read_split(storage, dataset, name) for name in ("train", SPLIT))
    return linear_floor(train, dataset, rows, val_rows)


def _time(
    storage: Storage, made: list[QuantizeResult], dataset: DatasetVersion, config: QuantizeConfig
) -> Timings:
    images = read_split(storage, dataset, SPLIT).images
    return time_candidates(storage, made, images, config, SYSTEM_CLOCK)
