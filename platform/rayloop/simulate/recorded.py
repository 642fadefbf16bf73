"""A finished run's own record -> the calibration it allows.

A record knows less than a measurement: one number of workers, one number of rows. So the whole
step, less the wait for the slowest, counts as work of the rows, and the exchange within the node as
free, since it is in the step already.
"""

from rayloop.errors import DataMissing
from rayloop.simulate.calibration import Calibration
from rayloop.storage import Storage
from rayloop.train.journal import Journal
from rayloop.train.result import TrainResult, load_result

P90 = 1.2816
"""Standard deviations from the median to the 90th percentile of a normal number."""
GPU_PLACES = 1_000_000
"""More than any node has."""

SUM_BYTES = {True: 8, False: 4}
"""Bytes of a gradient in the exchange: float64 with `train.worker_invariant`, else float32."""
BACKWARD_SHARE = 2 / 3
"""Of a step's computation; the backward pass has twice the operations of the forward pass."""


def calibration_of_run(storage: Storage, run_id: str = "") -> Calibration:
    """What a finished run tells of its machine and model.

    Args:
        storage: The root.
        run_id: Which run; empty means the newest.

    Raises:
        DataMissing: There is no such run, or it measured no speed.
    """
    result = load_result(storage, run_id)
    train = result.config["train"]
    steps_s = result.step_ms
    if result.images_per_second <= 0 or not {"p50", "p90"} <= set(steps_s):
        raise DataMissing(
            f"Run {result.run_id!r} measured no speed (it went on only to its end). Name another "
            "one: --simulate.run RUN_ID, or train one: python jobs/train.py PRESET"
        )
    workers = result.num_workers
    batch = float(train["global_batch_size"])
    rows = batch / workers
    invariant = bool(train["worker_invariant"])
    noise = max(0.0, (steps_s["p90"] / steps_s["p50"] - 1) / P90)
    start_s, restart_s = _starts(storage, result)
    return Calibration(
        name=f"run {result.run_id}",
        source=f"the record of the run, {workers} workers of {rows:g} rows",
        fixed_s=0.0,
        row_s=workers / result.images_per_second,
        rows_per_worker=rows,
        least_rows=rows,
        largest_rows=rows,
        noise=noise,
        # Workers on GPUs have one each, and do not share.
        cores=GPU_PLACES
        if train["use_gpu"]
        else workers * int(train["cpus_per_worker"]) or workers,
        platform_cores=0.0,
        contention=((1, 1.0),) if workers == 1 else ((1, 1.0), (workers, 1.0)),
        exchange_bytes=float(SUM_BYTES[invariant] * result.num_parameters),
        node_latency_s=0.0,
        crowded_latency_s=0.0,
        node_bytes_per_s=float("inf"),
        hidden_share=0.0 if invariant else BACKWARD_SHARE,
        checkpoint_s=result.checkpoint_ms / 1000,
        checkpoint_bytes=float(len(storage.read(f"{result.checkpoint}/state.pt"))),
        start_s=start_s,
        restart_s=restart_s,
        workers=workers,
        run_rows=result.steps * batch,
    )


def _starts(storage: Storage, result: TrainResult) -> tuple[float, float]:
    """Seconds of the run's start, and of a restart; a start where it never had to restart."""
    start_s = result.ledger_s.get("start", 0.0)
    path = f"runs/{result.run_id}/ledger.json"
    if storage.exists(path):
        journal = Journal.from_dict(storage.read_json(path))
        start_s = journal.causes()["start"] / max(1, len(journal.sessions))
    if result.interruptions:
        return start_s, result.ledger_s.get("restart", 0.0) / result.interruptions
    return start_s, start_s
