"""A trained run -> QuantizeResult, computed by one Ray task and reported line by line."""

from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayloop.clock import SYSTEM_CLOCK
from rayloop.config import QuantizeConfig
from rayloop.errors import RayloopError, WorkError
from rayloop.logs import stage_logger
from rayloop.quantize.result import QuantizeResult
from rayloop.quantize.work import quantize_run
from rayloop.storage import Storage

log = stage_logger("quantize")


def quantize(
    storage: Storage, config: QuantizeConfig, run_id: str = "", node_id: str = ""
) -> QuantizeResult:
    """Quantize a run's model in one task on the connected cluster.

    The result is written whether or not the gate passes; `QuantizeResult.passed` says which.

    Args:
        storage: The root everything lives under.
        config: The quantize section; the task takes `num_threads` CPUs.
        run_id: The run; empty means the newest.
        node_id: Ray's id of the node to do it on; empty leaves that to Ray.

    Raises:
        RayloopError: As `rayloop.quantize.work.quantize_run`.
    """
    where: Any = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
    task = ray.remote(num_cpus=config.num_threads, max_retries=1, scheduling_strategy=where)(_steps)
    steps: Any = task.options(num_returns="streaming").remote(storage, config, run_id)
    try:
        for step in steps:
            item = ray.get(step)
            if isinstance(item, QuantizeResult):
                log.info("gate: %s (%.0f s)", item.gate, item.seconds)
                return item
            log.info("%s", item)
    except RayTaskError as error:
        if isinstance(error.cause, RayloopError):
            raise error.cause from None
        raise
    raise WorkError("The quantization task ended without a result; run the job again.")


def _steps(storage: Storage, config: QuantizeConfig, run_id: str) -> Iterator[str | QuantizeResult]:
    yield from quantize_run(storage, config, run_id, SYSTEM_CLOCK)
