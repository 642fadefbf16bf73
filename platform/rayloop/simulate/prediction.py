"""A plan and a calibration -> what the plan would do, and where that is more than was measured.

A step is computed by the slowest worker, then summed over all of them:

    compute   slowdown(workers on the node) x (fixed + row x rows of a worker) / stages
    bubble    compute x (p - 1) / (v m)                                              schedule.py
    wait      compute x noise x slowest_of(nodes)                                    network.py
    exchange  all-reduce within nodes, then between them, less what hides            network.py

and a run is one start, then steps, checkpoints, failures and restarts               failures.py
"""

import math
from dataclasses import dataclass

from rayloop.errors import ConfigError
from rayloop.simulate.calibration import Calibration
from rayloop.simulate.failures import best_interval_s, goodput, mtbf_s
from rayloop.simulate.network import Link, all_reduce_s, exposed_s, slowest_of
from rayloop.simulate.schedule import Division, divide

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to be predicted.

    Attributes:
        workers: All workers.
        rows: Rows of a replica in one step.
        between: What connects a node to the others.
        workers_per_node: Workers of a node.
        failures_per_worker_day: Failures of one worker in a day.
        price_per_worker_hour: In any currency.
        run_rows: Rows to train on, all epochs together.
        stages: Stages of a pipeline; 1 is data parallel alone.
        micro_batches: Of a replica in one step.
        chunks: Groups of layers on each stage.
    """

    workers: int
    rows: float
    between: Link
    workers_per_node: int = 1
    failures_per_worker_day: float = 0.0
    price_per_worker_hour: float = 1.0
    run_rows: float
    stages: int = 1
    micro_batches: int = 1
    chunks: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a plan would do.

    Attributes:
        workers: All workers.
        global_batch_size: Rows of a step over all workers.
        step_s: Seconds of a step.
        rows_per_s: Rows a second while it trains, all workers.
        efficiency: `rows_per_s` over that of as many workers that are each alone.
        exchange_share: Share (0..1) of a step spent on the exchange, beyond what hides.
        bubble_share: Share (0..1) of a step in which a stage waits for another.
        wait_share: Share (0..1) of a step in which the nodes wait for the slowest.
        mtbf_s: Seconds between two failures of any worker; infinite where none fails.
        checkpoint_every_s: The best interval, from one step to the whole run.
        kept: Share (0..1) of the time after the start that is spent in steps that are kept.
        goodput: The same share of the run's whole time, its start included.
        steps: Of the run.
        failures: To be expected in the run.
        run_s: Seconds the run takes; infinite where it would never end.
        cost_per_hour: In the price's currency.
        cost: Of the run.
        extrapolated: Why the prediction reaches beyond what was measured; empty if it does not.
    """

    workers: int
    global_batch_size: float
    step_s: float
    rows_per_s: float
    efficiency: float
    exchange_share: float
    bubble_share: float
    wait_share: float
    mtbf_s: float
    checkpoint_every_s: float
    kept: float
    goodput: float
    steps: int
    failures: float
    run_s: float
    cost_per_hour: float
    cost: float
    extrapolated: tuple[str, ...]


def predict(plan: Plan, calibration: Calibration) -> Prediction:
    """What the plan would do.

    Raises:
        ConfigError: The workers do not make whole replicas.
    """
    division = divide(plan.workers, plan.stages, 1, plan.micro_batches, plan.chunks)
    if plan.rows <= 0:
        raise ConfigError(f"A replica needs rows in a step, got {plan.rows:g}.")
    on_node = min(plan.workers, plan.workers_per_node)
    nodes = math.ceil(plan.workers / plan.workers_per_node)
    alone_s = calibration.fixed_s + calibration.row_s * plan.rows
    compute_s = calibration.slowdown(on_node) * alone_s / plan.stages
    bubble_s = compute_s * division.bubble
    wait_s = compute_s * calibration.noise * slowest_of(nodes)
    exchange_s = _exchange_s(division, on_node, plan.between, calibration, compute_s)
    step_s = compute_s + bubble_s + wait_s + exchange_s
    batch = plan.rows * division.data
    steps = math.ceil(plan.run_rows / batch)
    between_s = mtbf_s(plan.workers, plan.failures_per_worker_day)
    interval_s = max(step_s, best_interval_s(calibration.checkpoint_s, between_s))
    interval_s = min(interval_s, steps * step_s)
    kept = goodput(interval_s, calibration.checkpoint_s, calibration.restart_s, between_s)
    work_s = steps * step_s
    run_s = calibration.start_s + work_s / kept if kept > 0 else math.inf
    cost_per_hour = plan.workers * plan.price_per_worker_hour
    return Prediction(
        workers=plan.workers,
        global_batch_size=batch,
        step_s=step_s,
        rows_per_s=batch / step_s,
        efficiency=alone_s / (plan.stages * step_s),
        exchange_share=exchange_s / step_s,
        bubble_share=bubble_s / step_s,
        wait_share=wait_s / step_s,
        mtbf_s=between_s,
        checkpoint_every_s=interval_s,
        kept=kept,
        goodput=work_s / run_s,
        steps=steps,
        failures=run_s / between_s,
        run_s=run_s,
        cost_per_hour=cost_per_hour,
        cost=cost_per_hour * run_s / SECONDS_AN_HOUR if cost_per_hour else 0.0,
        extrapolated=_beyond(plan, calibration, on_node, nodes),
    )


def _exchange_s(
    division: Division,
    on_node: int,
    between: Link,
    calibration: Calibration,
    compute_s: float,
) -> float:
    """What a step feels of summing each stage's gradients over the replicas.

    Stages lie on neighbouring workers. The stages of a node send at once and share its link, so a
    node sends the bytes of all of them, whatever their number.
    """
    if division.data == 1:
        return 0.0
    replicas_on_node = max(1, on_node // division.pipeline)
    stages_on_node = min(division.pipeline, on_node)
    stage_bytes = calibration.exchange_bytes / division.pipeline
    inside_s = all_reduce_s(stage_bytes, replicas_on_node, calibration.inside(on_node))
    ends = math.ceil(division.data / replicas_on_node)
    between_s = all_reduce_s(stage_bytes * stages_on_node, ends, between)
    hides_under_s = calibration.hidden_share * compute_s
    return exposed_s(inside_s + between_s, hides_under_s, stage_bytes)


def _beyond(plan: Plan, calibration: Calibration, on_node: int, nodes: int) -> tuple[str, ...]:
    """Everything in which the plan leaves what was measured."""
    told = []
    if plan.workers > calibration.workers:
        told.append(f"{plan.workers} workers, measured with {calibration.workers}")
    if nodes > 1:
        told.append(f"{nodes} nodes: their network is what the settings say, nothing measured it")
    if on_node > calibration.contention[-1][0]:
        told.append(f"{on_node} workers on a node, measured with {calibration.contention[-1][0]}")
    if not calibration.least_rows <= plan.rows <= calibration.largest_rows:
        told.append(
            f"{plan.rows:g} rows of a worker, measured with {calibration.least_rows:g} to "
            f"{calibration.largest_rows:g}"
        )
    if plan.stages > 1:
        told.append("a pipeline: stages of equal work, activations sent for nothing")
    return tuple(told)
